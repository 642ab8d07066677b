"""COCO-format JSON as this package reads it: what a box detector uses, and nothing else.

Training and evaluation start from the same records. Polygons, masks and keypoints are not looked at:
whatever state they are in, they neither drop a box nor stop a run.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import UserError

_LARGEST_AREA = 1e10  # square pixels
SECTIONS = ("images", "annotations", "categories")


def read_annotations(json_file: str | os.PathLike) -> dict:
    """The parsed JSON.

    Raises:
        UserError: it cannot be read, or is not in COCO format.
    """
    check_path(json_file, "annotation file", "merge several files into one, with new image ids")
    try:
        with open(json_file, encoding="utf-8-sig") as file:  # with or without a byte order mark
            content = json.load(file)
    except OSError as error:
        raise UserError(
            f"cannot read the annotations {os.path.abspath(json_file)}: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_file} is not a JSON file: {error}") from None
    if problem := _format_problem(content):
        raise UserError(
            f"{json_file} is not in COCO format: expected an object with the lists of records "
            f"{', '.join(SECTIONS)}, found {problem}. Pascal VOC and YOLO have keys of their own, "
            "data.voc and data.yolo"
        )
    return content


def _format_problem(content: object) -> str | None:
    if not isinstance(content, dict):
        return type(content).__name__
    if missing := [key for key in SECTIONS if key not in content]:
        return f"{', '.join(content) or 'nothing'}, without {', '.join(missing)}"
    for key in SECTIONS:
        value = content[key]
        if not isinstance(value, list):
            return f"{key} as {_kind(value)} instead of a list"
        for position, record in enumerate(value):
            if not isinstance(record, dict):
                return f"{key}[{position}] as {_kind(record)} instead of an object: {record!r:.60}"
    return None


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    return {str: "a text", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


def check_path(path: object, what: str, advice: str) -> None:
    """Raises a UserError for what is not one path, such as a list of paths."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"expected the path of one {what}, got {_kind(path)}: {path!r}; {advice}")


def load_coco(json_file: str, image_root: str, name: str | None = None) -> list[dict]:
    """detectron2 dataset dicts, like its ``load_coco_json``, for boxes alone.

    Ids may be whole numbers or texts, also mixed. Each annotation has ``bbox`` (XYWH_ABS),
    ``category_id`` (the class, 0..K-1 in the order of the ids) and ``iscrowd``.

    Args:
        name: a data set, whose metadata get the classes and their ids.

    Raises:
        UserError: the file is not in COCO format, or an annotation has no known category.
    """
    content = read_annotations(json_file)
    categories = in_order(content["categories"])
    classes = {c["id"]: k for k, c in enumerate(categories)}
    if name is not None:
        MetadataCatalog.get(name).set(
            thing_classes=[c["name"] for c in categories], thing_dataset_id_to_contiguous_id=classes
        )
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation["category_id"] not in classes:
            raise UserError(
                f"{json_file}: annotation {annotation.get('id')!r} of image {annotation['image_id']!r} has "
                f"the unknown category {annotation['category_id']!r}; known are {list(classes)}"
            )
        annotations[annotation["image_id"]].append(
            {
                "iscrowd": int(annotation.get("iscrowd", 0)),
                "bbox": annotation["bbox"],
                "category_id": classes[annotation["category_id"]],
                "bbox_mode": BoxMode.XYWH_ABS,
            }
        )
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": image["id"],
            "annotations": annotations[image["id"]],
        }
        for image in in_order(content["images"])
    ]


def numbered(content: dict) -> tuple[dict, dict, dict]:
    """COCO-format content as evaluators take it: ids 1..n, and an ``area`` and ``iscrowd`` everywhere.

    pycocotools keeps annotation ids in an array of floats in which 0 means "no match", and
    faster-coco-eval in 64-bit integers: a text, 0 or a number beyond them is never found.

    Returns:
        The content, and the numbers of images and of categories by the file's ids.
    """
    images, categories = in_order(content["images"]), in_order(content.get("categories", ()))
    image_numbers = {image["id"]: number for number, image in enumerate(images, 1)}
    category_numbers = {category["id"]: number for number, category in enumerate(categories, 1)}
    result = {
        **content,
        "images": [{**image, "id": image_numbers[image["id"]]} for image in images],
        "categories": [{**c, "id": category_numbers[c["id"]]} for c in categories],
    }
    if "annotations" in content:
        kept = [
            a
            for a in content["annotations"]
            if a["image_id"] in image_numbers and a["category_id"] in category_numbers
        ]
        result["annotations"] = [
            {
                **annotation,
                "id": number,
                "image_id": image_numbers[annotation["image_id"]],
                "category_id": category_numbers[annotation["category_id"]],
                "area": annotation["area"] if is_area(annotation.get("area")) else _box_area(annotation),
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
            for number, annotation in enumerate(kept, 1)
        ]
    return result, image_numbers, category_numbers


def _box_area(annotation: dict) -> float:
    *_, width, height = annotation["bbox"]
    return max(width, 0) * max(height, 0)


def in_order(records: Iterable[dict]) -> list[dict]:
    """By their ids: numbers first, texts after them."""
    return sorted(records, key=lambda record: (isinstance(record["id"], str), record["id"]))


def is_area(value: object) -> bool:
    """A positive number, at most the largest that COCO's area ranges hold: above it nothing counts."""
    return is_number(value) and 0 < value <= _LARGEST_AREA


def is_number(value: object) -> TypeGuard[int | float]:
    """A finite number; no bool, and no integer beyond the range of floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
