"""Data sets, augmentation and loading."""

from .loader import build_train_loader
from .mapper import DetrDatasetMapper, test_augmentations, train_augmentations
from .register import (
    check_datasets,
    check_num_classes,
    coco_dataset,
    register_coco,
    registered_dataset,
)
from .synthetic import generate_shapes, shapes_dataset

__all__ = [
    "DetrDatasetMapper",
    "build_train_loader",
    "check_datasets",
    "check_num_classes",
    "coco_dataset",
    "generate_shapes",
    "register_coco",
    "registered_dataset",
    "shapes_dataset",
    "test_augmentations",
    "train_augmentations",
]
