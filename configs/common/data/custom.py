"""Data of your own: paths, given on the command line or in a config.

    data.train_json=... data.train_images=... data.val_json=... data.val_images=...    COCO format
    data.yolo=data.yaml                                                                YOLO
    data.voc=VOCdevkit/VOC2012                                                         Pascal VOC

The classes are read from the data: a config that uses this file sets ``model.num_classes = None``.
Without a validation set a run trains and evaluates nothing.
"""

from detectron2.config import LazyCall as L

from sparse_detr.data import own_dataset

from .coco import dataloader

data = dict(
    train_json=None,  # or a list of files, which become one set
    train_images=None,  # folder that the file names in the JSON are relative to; or a list, one for each file
    val_json=None,
    val_images=None,
    yolo=None,  # a data.yaml: training and validation set
    voc=None,  # a folder of Pascal VOC, or a list of two: training and validation set
    classes=None,  # names of those to learn, in their order; None: all that the data have
    check=True,  # look at annotations and image files before the first step
)

dataloader.train.dataset = L(own_dataset)(
    names="custom_train", data="${data}", split="train", folder="${train.output_dir}/data"
)
dataloader.test.dataset = L(own_dataset)(
    names="custom_val", data="${data}", split="val", folder="${train.output_dir}/data"
)
