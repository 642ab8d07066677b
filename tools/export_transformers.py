#!/usr/bin/env python
"""Write a trained Deformable DETR for Hugging Face's transformers.

``sparse-detr export-transformers``, from a checkout: projects/sparse_detr/cli/export_transformers.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("export-transformers")
