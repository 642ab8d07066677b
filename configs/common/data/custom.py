"""Data of your own in COCO format: four paths, given on the command line or in a config.

    data.train_json=... data.train_images=... data.val_json=... data.val_images=...

Class names and ids are read from the JSON; ``model.num_classes`` must be their number.
"""

from detectron2.config import LazyCall as L

from sparse_detr.data import coco_dataset

from .coco import dataloader

data = dict(train_json=None, train_images=None, val_json=None, val_images=None)

dataloader.train.dataset = L(coco_dataset)(
    names="custom_train", json_file="${data.train_json}", image_root="${data.train_images}"
)
dataloader.test.dataset = L(coco_dataset)(
    names="custom_val", json_file="${data.val_json}", image_root="${data.val_images}"
)
