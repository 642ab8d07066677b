"""Look at data before training with it: annotations and image files.

    sparse-detr check-data train.json train/                      COCO format
    sparse-detr check-data train.json train/ val.json val/        ... and compare the two sets
    sparse-detr check-data data.yaml                              YOLO, both sets
    sparse-detr check-data VOCdevkit/VOC2012                      Pascal VOC, both sets
    sparse-detr check-data data.train_json=[a.json,b.json] data.train_images=[a/,b/] data.classes=[car]

Names what must be mended (exit status 1) and what training would drop or clip. train_net.py makes
the same check before the first step, with the limits on objects per image that its config has (here those
of the COCO configs). The last form takes the keys of a training's command, whatever they are.
"""

import tempfile

from detectron2.utils.logger import setup_logger

from ..config import load_config
from ..engine.checks import check_own_data
from . import flags

KEYS = ("train_json", "train_images", "val_json", "val_images")


def main() -> None:
    parser = flags.parser(__doc__)
    parser.add_argument(
        "data", nargs="+", help="files and folders, or data.KEY=VALUE as in a training's command"
    )
    words = parser.parse_args().data
    setup_logger(name="sparse_detr")
    with tempfile.TemporaryDirectory() as folder:
        as_overrides = all(word.startswith("data.") and "=" in word for word in words)
        cfg = load_config("custom/deformable_detr_r50", words if as_overrides else ())
        cfg.train.output_dir = folder
        if not as_overrides:
            if len(words) == 1:
                keys: tuple[str, ...] = ("yolo" if words[0].endswith((".yaml", ".yml")) else "voc",)
            elif len(words) in (2, 4):
                keys = KEYS[: len(words)]
            else:
                parser.error("a validation set is two arguments: its JSON file and its image folder")
            cfg.data.update(dict(zip(keys, words)))
        check_own_data(cfg, "train", "val")
    print("no problem found that must be mended")
