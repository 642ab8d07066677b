"""Look at data in COCO format before training with it: annotations and image files.

    sparse-detr check-data train.json train/
    sparse-detr check-data train.json train/ val.json val/     # and compare the two sets

Names what must be mended (exit status 1) and what training would drop or clip. train_net.py makes
the same check before the first step, with the limits on objects per image that its config has (here those
of the COCO configs).
"""

from detectron2.utils.logger import setup_logger

from ..data import check_data
from . import flags


def main() -> None:
    parser = flags.parser(__doc__)
    parser.add_argument("annotations", help="training set: JSON file")
    parser.add_argument("images", help="... and the folder that its file names are relative to")
    parser.add_argument("val", nargs="*", metavar="VAL", help="the same of the validation set")
    args = parser.parse_args()
    if len(args.val) not in (0, 2):
        parser.error("a validation set is two arguments: its JSON file and its image folder")
    setup_logger(name="sparse_detr")
    check_data((args.annotations, args.images), tuple(args.val) or None)
    print("no problem found that must be mended")
