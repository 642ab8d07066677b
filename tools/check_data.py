#!/usr/bin/env python
"""Look at data in COCO format before training with it: annotations and image files.

    python tools/check_data.py train.json train/
    python tools/check_data.py train.json train/ val.json val/     # and compare the two sets

Names what must be mended (exit status 1) and what training would drop or clip. train_net.py makes
the same check before the first step.
"""

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=r"`torch\.jit\.")  # detectron2's import
if importlib.util.find_spec("sparse_detr") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects"))

from detectron2.utils.logger import setup_logger  # noqa: E402

from sparse_detr.data import check_data  # noqa: E402
from sparse_detr.errors import told_in_one_line  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", help="training set: JSON file")
    parser.add_argument("images", help="... and the folder that its file names are relative to")
    parser.add_argument("val", nargs="*", metavar="VAL", help="the same of the validation set")
    args = parser.parse_args()
    if len(args.val) not in (0, 2):
        parser.error("a validation set is two arguments: its JSON file and its image folder")
    setup_logger(name="sparse_detr")
    check_data((args.annotations, args.images), tuple(args.val) or None)
    print("no problem found that must be mended")


if __name__ == "__main__":
    with told_in_one_line():
        main()
