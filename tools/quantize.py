#!/usr/bin/env python
"""Write a trained detector in int8, for CPUs.

``sparse-detr quantize``, from a checkout: projects/sparse_detr/cli/quantize.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("quantize")
