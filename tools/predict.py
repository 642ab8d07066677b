#!/usr/bin/env python
"""``sparse_detr.bulk``, which says how it is called."""

import _checkout

from sparse_detr.bulk import main

if __name__ == "__main__":
    _checkout.run(main)
