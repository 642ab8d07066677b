"""Data of your own in COCO format: paths, given on the command line or in a config.

    data.train_json=... data.train_images=... data.val_json=... data.val_images=...

The classes are read from the JSON: a config that uses this file sets ``model.num_classes = None``.
Without ``val_json`` and ``val_images`` a run trains and evaluates nothing.
"""

from detectron2.config import LazyCall as L

from sparse_detr.data import coco_dataset

from .coco import dataloader

data = dict(
    train_json=None,
    train_images=None,  # folder that the file names in the JSON are relative to
    val_json=None,
    val_images=None,
    classes=None,  # their names; None: as in the JSON, in the order of their ids
    check=True,  # look at annotations and image files before the first step
)

dataloader.train.dataset = L(coco_dataset)(
    names="custom_train", json_file="${data.train_json}", image_root="${data.train_images}"
)
dataloader.test.dataset = L(coco_dataset)(
    names="custom_val", json_file="${data.val_json}", image_root="${data.val_images}"
)
