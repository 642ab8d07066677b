#!/usr/bin/env python
"""Look at data before training with it: annotations and image files.

    python tools/check_data.py train.json train/                      COCO format
    python tools/check_data.py train.json train/ val.json val/        ... and compare the two sets
    python tools/check_data.py data.yaml                              YOLO, both sets
    python tools/check_data.py VOCdevkit/VOC2012                      Pascal VOC, both sets
    python tools/check_data.py data.train_json=[a.json,b.json] data.train_images=[a/,b/] data.classes=[car]

Names what must be mended (exit status 1) and what training would drop or clip. train_net.py makes
the same check before the first step, with the limits on objects per image that its config has (here those
of the COCO configs). The last form takes the keys of a training's command, whatever they are.
"""

import tempfile

import _checkout
from detectron2.utils.logger import setup_logger

from sparse_detr.config import load_config
from sparse_detr.engine.checks import check_own_data

KEYS = ("train_json", "train_images", "val_json", "val_images")


def main() -> None:
    parser = _checkout.parser(__doc__)
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
                keys = ["yolo" if words[0].endswith((".yaml", ".yml")) else "voc"]
            elif len(words) in (2, 4):
                keys = KEYS[: len(words)]
            else:
                parser.error("a validation set is two arguments: its JSON file and its image folder")
            cfg.data.update(dict(zip(keys, words)))
        check_own_data(cfg, "train", "val")
    print("no problem found that must be mended")


if __name__ == "__main__":
    _checkout.run(main)
