"""What the scripts of this checkout share. They import it first, so that they run with the package beside
them, installed or not.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "projects"), str(ROOT)]
warnings.filterwarnings("ignore", message=r"`torch\.jit\.")  # detectron2's import

from sparse_detr import cli  # noqa: E402
from sparse_detr.cli.flags import (  # noqa: E402, F401
    add_dtype,
    add_keep_ratio,
    add_model,
    add_overrides,
    image_size,
    parser,
)
from sparse_detr.errors import told_in_one_line  # noqa: E402


def run(main: Callable[[], int | None] | str) -> None:
    """Runs a script, or the package's command of that name; what its user has to mend is told in one line."""
    if isinstance(main, str):
        cli.run(main)
    else:
        with told_in_one_line():
            sys.exit(main())
