#!/usr/bin/env python
"""``make demo``: train a small detector on generated data, evaluate it, draw what it finds.

``sparse-detr demo``, from a checkout: projects/sparse_detr/cli/demo.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("demo")
