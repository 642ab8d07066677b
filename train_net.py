#!/usr/bin/env python
"""Train or evaluate a detector.

``sparse-detr train``, from a checkout: projects/sparse_detr/cli/train.py.
"""

import importlib.util
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=r"`torch\.jit\.")  # detectron2's import
if importlib.util.find_spec("sparse_detr") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent / "projects"))

from sparse_detr import cli  # noqa: E402
from sparse_detr.cli.train import arguments  # noqa: E402, F401
from sparse_detr.cli.train import run_process as main  # noqa: E402, F401

if __name__ == "__main__":
    cli.run("train")
