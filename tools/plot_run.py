#!/usr/bin/env python
"""A page on a run, or on several.

``sparse-detr plot``, from a checkout: projects/sparse_detr/cli/plot.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("plot")
