"""A set in COCO format, drawn up image by image from files of another format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..image import EXTENSIONS, ImageError, image_size
from ..report import Report

IMAGE_ENDINGS = (*EXTENSIONS, ".mpo")

# The names under which exports have the two splits, the usual first.
SPLITS = {"train": ("train", "training", "trainval", "default"), "val": ("val", "valid", "validation")}


class SetBuilder:
    """Fills a ``Report`` with images and boxes; ids are counted from 1, those of the classes from 0.

    Args:
        label: what messages call the set.
        images: all image files of the set; their common folder becomes its root.
        classes: the names, class k is the k-th.
    """

    def __init__(self, label: str, images: Sequence[Path], classes: Sequence[str]) -> None:
        root = os.path.commonpath([image.absolute().parent for image in images]) if images else "."
        categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
        self.report = Report(label, root, {"images": [], "annotations": [], "categories": categories})
        self._unreadable: list[str] = []

    def add_image(self, image: Path, size: Sequence[int] | None = None) -> dict[str, Any] | None:
        """The record of an image, with the (width, height) given, or the file's; None if it has none."""
        try:
            width, height = size or image_size(image)
        except ImageError as error:
            self._unreadable.append(f"{image.name}: {error.problem}")
            return None
        images = self.report.content["images"]
        name = os.path.relpath(image.absolute(), self.report.image_root)
        images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
        return images[-1]

    def add_box(self, image: Mapping[str, Any], number: int, box: Sequence[float]) -> None:
        """An object of class ``number`` in the image of that record; ``box`` is (x, y, width, height)."""
        annotations = self.report.content["annotations"]
        box = [round(value, 3) for value in box]
        record = dict(id=len(annotations) + 1, image_id=image["id"], category_id=number, bbox=box, iscrowd=0)
        annotations.append({**record, "area": round(box[2] * box[3], 3)})

    def tell_unreadable(self) -> None:
        """Keeps the images without a size as an error."""
        self.report.add(
            "image files that cannot be read",
            self._unreadable,
            "replace the files, or take them out",
            fatal=True,
        )
