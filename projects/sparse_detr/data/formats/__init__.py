"""YOLO folders, Pascal VOC, several COCO files, some of a set's classes: each becomes one set in COCO format.

What cannot be read as its owner means it is collected in the ``Report`` that is returned.
"""

from .merge import merge_coco
from .subset import select_classes
from .voc import has_voc_split, read_voc, voc_classes
from .yolo import has_yolo_split, read_yolo, yolo_classes

__all__ = [
    "has_voc_split",
    "has_yolo_split",
    "merge_coco",
    "read_voc",
    "read_yolo",
    "select_classes",
    "voc_classes",
    "yolo_classes",
]
