"""Data sets, augmentation and loading."""

from .check import category_names, check_coco, check_data
from .coco import load_coco
from .evaluation import FastCOCOEvaluator
from .image import ImageError, read_image
from .loader import build_train_loader
from .mapper import DetrDatasetMapper, OncePerBatch, test_augmentations, train_augmentations
from .own import class_list, has_own_split, own_classes, own_dataset, own_files
from .register import (
    check_classes,
    check_datasets,
    coco_dataset,
    register_coco,
    registered_dataset,
)
from .squares import square_test_augmentations, square_train_augmentations
from .synthetic import generate_shapes, shapes_dataset

__all__ = [
    "DetrDatasetMapper",
    "FastCOCOEvaluator",
    "ImageError",
    "OncePerBatch",
    "build_train_loader",
    "category_names",
    "check_classes",
    "check_coco",
    "check_data",
    "check_datasets",
    "class_list",
    "coco_dataset",
    "generate_shapes",
    "has_own_split",
    "load_coco",
    "own_classes",
    "own_dataset",
    "own_files",
    "read_image",
    "register_coco",
    "registered_dataset",
    "shapes_dataset",
    "square_test_augmentations",
    "square_train_augmentations",
    "test_augmentations",
    "train_augmentations",
]
