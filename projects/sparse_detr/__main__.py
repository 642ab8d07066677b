"""``python -m sparse_detr``: the console command, also for ``torchrun ... -m sparse_detr train``."""

from .cli import main

if __name__ == "__main__":
    main()
