#!/usr/bin/env python
"""Detect objects in images, folders, globs and videos.

``sparse-detr predict``, from a checkout: projects/sparse_detr/cli/predict.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("predict")
