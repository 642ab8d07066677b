#!/usr/bin/env python
"""Look at data in COCO format before training with it.

``sparse-detr check-data``, from a checkout: projects/sparse_detr/cli/check_data.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("check-data")
