#!/usr/bin/env python
"""Show what is installed and what is missing; runs where nothing is installed.

``sparse-detr check-install``, from a checkout: projects/sparse_detr/cli/check_install.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("check-install")
