#!/usr/bin/env python
"""Detect in many images; the results survive a kill.

``sparse-detr predict-many``, from a checkout: projects/sparse_detr/cli/predict_many.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("predict-many")
