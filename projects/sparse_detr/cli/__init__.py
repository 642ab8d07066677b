"""The console command ``sparse-detr``: a table of subcommands, each a module with a ``main()``.

The scripts of a checkout, ``train_net.py`` and those in ``tools/``, run the same modules. Nothing heavy is
imported before a subcommand is known, so that ``--help`` is there at once.
"""

import difflib
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import UserError, told_in_one_line

# Subcommand: its module here, the script of a checkout that is the same, and what it is for.
COMMANDS = {
    "train": ("train", "train_net.py", "train or evaluate a detector from a config"),
    "predict": ("predict", "tools/demo.py", "detect in images, folders and videos: pictures, JSON"),
    "predict-many": (
        "predict_many",
        "tools/predict.py",
        "detect in a million images: JSON lines, restartable",
    ),
    "plot": ("plot", "tools/plot_run.py", "a page on a run, or on several: curves, AP, worst errors"),
    "check-install": ("check_install", "tools/check_install.py", "what is installed, and what is missing"),
    "configs": ("configs", None, "names of the shipped configs"),
    "check-data": ("check_data", "tools/check_data.py", "look at annotations and images before training"),
    "visualize-data": ("visualize_data", "tools/visualize_data.py", "draw the training data"),
    "visualize-tokens": (
        "visualize_tokens",
        "tools/visualize_tokens.py",
        "draw which tokens an encoder keeps",
    ),
    "analyze": ("analyze", "tools/analyze_model.py", "parameters and multiply-adds, module by module"),
    "tradeoff": ("tradeoff", "tools/tradeoff.py", "AP over milliseconds at several token budgets"),
    "export": ("export_onnx", "tools/export_onnx.py", "write an ONNX file, compare it with PyTorch"),
    "quantize": ("quantize", "tools/quantize.py", "write a detector in int8 for CPUs, compare it"),
    "export-transformers": ("export_transformers", "tools/export_transformers.py", "for transformers"),
    "demo": ("demo", "tools/demo_quick.py", "draw a data set, train on it, show what was learned"),
}


def usage() -> str:
    """The map: what ``sparse-detr --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, _, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sparse-detr COMMAND ...",
            "",
            "Efficient DETR detectors for detectron2.",
            "",
            *lines,
            "",
            "sparse-detr COMMAND --help has the flags of each; sparse-detr --version the version.",
            "Several processes: sparse-detr train --num-gpus N, or torchrun ... -m sparse_detr train ...",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the subcommand that the first argument names on the others; ends the program.

    Args:
        arguments: those of the command line if None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
    elif words[0] == "--version":
        print(__version__)
    else:
        sys.argv = [f"sparse-detr {words[0]}", *words[1:]]  # as argparse shows and reads it
        run(words[0])


def run(command: str) -> None:
    """Runs a subcommand on ``sys.argv``; what its user has to mend is told in one line."""
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.")  # detectron2's import
    with told_in_one_line():
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"there is no command {command!r}: {hint}sparse-detr --help lists them")
        try:
            module = import_module(f".{COMMANDS[command][0]}", __name__)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == __name__.partition(".")[0]:
                raise
            raise UserError(
                f"{command} needs {error.name}, which is not installed: "
                "sparse-detr check-install says how to get it"
            ) from None
        sys.exit(module.main())
