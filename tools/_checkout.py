"""What the scripts of this checkout share. They import it first, so that they run with the package beside
them, installed or not.

Only the standard library is imported here: some scripts run where nothing else is installed.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "projects"), str(ROOT)]
warnings.filterwarnings("ignore", message=r"`torch\.jit\.")  # detectron2's import


def parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows ``description``, a script's docstring, as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def image_size(text: str) -> tuple[int, int]:
    """ "800x1066" -> (800, 1066), height first."""
    height, width = (int(side) for side in text.lower().split("x"))
    return height, width


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("opts", nargs="*", help="config overrides, path.key=value")


def add_model(parser: argparse.ArgumentParser) -> None:
    """A run's model, or a config's with a checkpoint."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="output folder of a run; its last checkpoint")
    source.add_argument("--config-file", metavar="FILE", help="a config or a shipped one's name")
    parser.add_argument("--weights", default="", metavar="FILE", help="a checkpoint")


def add_keep_ratio(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-ratio",
        type=float,
        metavar="RATIO",
        help="share of tokens the encoder refreshes, instead of the config's",
    )


def add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--latency-ms",
        type=float,
        metavar="MS",
        help="milliseconds an image may take, instead of a keep ratio: measured here, at the first image of "
        "each size",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        default="float32",
        help='precision: "bfloat16"; "auto": bfloat16 where the hardware has it (default: float32)',
    )


def run(main: Callable[[], int | None]) -> None:
    """Runs a script; what its user has to mend is told in one line."""
    from sparse_detr.errors import told_in_one_line

    with told_in_one_line():
        sys.exit(main())
