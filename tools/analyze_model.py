#!/usr/bin/env python
"""Parameters and multiply-adds of a model.

``sparse-detr analyze``, from a checkout: projects/sparse_detr/cli/analyze.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("analyze")
