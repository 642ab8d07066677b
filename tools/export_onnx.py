#!/usr/bin/env python
"""Write a trained detector as an ONNX file.

``sparse-detr export``, from a checkout: projects/sparse_detr/cli/export_onnx.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("export")
