#!/usr/bin/env python
"""Draw which tokens an encoder keeps.

``sparse-detr visualize-tokens``, from a checkout: projects/sparse_detr/cli/visualize_tokens.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("visualize-tokens")
