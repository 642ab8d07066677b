#!/usr/bin/env python
"""Draw the training data.

``sparse-detr visualize-data``, from a checkout: projects/sparse_detr/cli/visualize_data.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("visualize-data")
