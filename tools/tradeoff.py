#!/usr/bin/env python
"""What accuracy costs, at several token budgets.

``sparse-detr tradeoff``, from a checkout: projects/sparse_detr/cli/tradeoff.py.
"""

import _checkout

if __name__ == "__main__":
    _checkout.run("tradeoff")
