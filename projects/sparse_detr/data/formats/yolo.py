"""YOLO: a ``data.yaml`` that names folders of images, and a text file of labels for each image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...errors import UserError, listed
from ..coco import is_number
from ..report import Report
from .builder import IMAGE_ENDINGS, SPLITS, SetBuilder

_SHARE_SLACK = 0.01  # of rounding, in labels between 0 and 1


def yolo_classes(data_yaml: str) -> list[str]:
    """The names in a ``data.yaml``, by their numbers.

    Raises:
        UserError: it cannot be read, has no names, or ``nc`` is another number.
    """
    content = _yolo_content(data_yaml)
    names = content.get("names")
    if isinstance(names, Mapping):
        numbers = list(names)
        if sorted(numbers, key=str) != sorted(range(len(names)), key=str):
            raise UserError(
                f"{data_yaml}: the numbers of the names are {listed(list(map(str, numbers)), 5)}, expected "
                f"all of 0 to {len(names) - 1}: labels count classes from 0 without a gap"
            )
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{data_yaml}: expected names: [...], the classes, found names: {names!r}")
    if isinstance(number := content.get("nc"), int) and number != len(names):
        raise UserError(f"{data_yaml}: nc is {number}, but names has {len(names)} classes: mend one of them")
    return [str(name) for name in names]


def has_yolo_split(data_yaml: str, split: str) -> bool:
    """Whether a ``data.yaml`` names images for "train" or "val"."""
    return _yolo_entry(_yolo_content(data_yaml), split) is not None


def read_yolo(data_yaml: str, split: str) -> Report:
    """One split of a ``data.yaml``, "train" or "val".

    A label is "class x y width height" (of the centre and size, 0..1) or "class" and a polygon's corners,
    whose bounding box is taken; with ``kpt_shape``, key points behind the box are left out. An image without
    a label file, or with an empty one, is background.

    Raises:
        UserError: the YAML cannot be read, or names a folder that does not exist.
    """
    content = _yolo_content(data_yaml)
    names = yolo_classes(data_yaml)
    entries = _yolo_entry(content, split)
    if entries is None:
        raise UserError(f"{data_yaml} has no {split} images: add the line {split}: images/{split}")
    images = [path for entry in entries for path in _yolo_images(data_yaml, content, split, entry)]
    builder = SetBuilder(f"{data_yaml} ({split})", images, names)
    report = builder.report
    labels = {image: _label_file(image) for image in images}
    found = [image for image in images if labels[image].is_file()]
    if images and not found:
        report.fail(
            f"not one of the {len(images)} images has a label file",
            f"expected {labels[images[0]]} for {images[0]}: is the folder missing, or elsewhere?",
        )
        return report
    problems: dict[str, list[str]] = {key: [] for key in _LABEL_PROBLEMS}
    for image in images:
        record = builder.add_image(image)
        if record is None or not labels[image].is_file():
            continue
        for number, line in enumerate(_lines(labels[image], problems), 1):
            parsed = _label(line, len(names), "kpt_shape" in content)
            if isinstance(parsed, str):
                problems[parsed].append(f"{labels[image].name} line {number}: {line[:40]}")
                continue
            label, (left, top, right, bottom) = parsed
            width, height = record["width"], record["height"]
            box = [left * width, top * height, (right - left) * width, (bottom - top) * height]
            builder.add_box(record, label, box)
    builder.tell_unreadable()
    for key, records in problems.items():
        known = listed([f"{number} {name}" for number, name in enumerate(names)], 20)
        report.add(key, records, _LABEL_PROBLEMS[key].format(known=known), fatal=True)
    return report


_NO_TEXT = "label files that are no text"
_NO_LABEL = 'label lines that are neither "class x y width height" nor "class" and three corners or more'
_NO_CLASS = "labels whose class is not in names"
_NO_SHARE = "label values beyond 0 and 1"
_LABEL_PROBLEMS = {
    _NO_TEXT: "replace them",
    _NO_LABEL: "mend or delete the lines",
    _NO_CLASS: "known are {known}",
    _NO_SHARE: "YOLO's are shares of the image's width and height: divide pixels by these",
}


def _yolo_content(data_yaml: str) -> dict[str, Any]:
    if not isinstance(data_yaml, str | os.PathLike):
        raise UserError(
            f"data.yolo={data_yaml!r}: expected the path of one data.yaml, which may list folders"
        )
    if os.path.isdir(data_yaml):
        inside = os.path.join(data_yaml, "data.yaml")
        raise UserError(f"data.yolo={data_yaml} is a folder: pass the file in it, data.yolo={inside}")
    try:
        with open(data_yaml, encoding="utf-8-sig") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"cannot read data.yolo={os.path.abspath(data_yaml)}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{data_yaml} is not a YAML file: {words}") from None
    if not isinstance(content, dict):
        raise UserError(f"{data_yaml}: expected the keys train, val and names, found {content!r:.60}")
    return content


def _yolo_entry(content: Mapping[str, Any], split: str) -> list[str] | None:
    value = next((content[key] for key in SPLITS[split] if content.get(key)), None)
    if value is None:
        return None
    return [str(entry) for entry in value] if isinstance(value, list) else [str(value)]


def _yolo_images(data_yaml: str, content: Mapping[str, Any], split: str, entry: str) -> list[Path]:
    """Images of a folder, or those that a text file lists, in order."""
    here = Path(data_yaml).resolve().parent
    bases = [here / str(content["path"]), here] if content.get("path") else [here]
    # Roboflow writes ../train/images for the folder beside the file
    tried = [base / form for base in bases for form in (entry, entry.removeprefix("../"))]
    place = next((path for path in tried if path.exists()), None)
    if place is None:
        raise UserError(
            f"{data_yaml}: there is no {split} folder {entry}, looked for as "
            f"{', '.join(dict.fromkeys(os.path.normpath(path) for path in tried))}: mend its path in the file"
        )
    if place.is_dir():
        images = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
        if not images:
            raise UserError(f"{data_yaml}: the {split} folder {place} holds no images")
        return [Path(os.path.normpath(path)) for path in images]
    lines = [line.strip() for line in place.read_text(encoding="utf-8-sig").splitlines()]
    return [Path(os.path.normpath(place.parent / line)) for line in lines if line]


def _label_file(image: Path) -> Path:
    """``labels/a.txt`` of ``images/a.jpg``; beside an image that lies in no such folder."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _lines(path: Path, problems: Mapping[str, list[str]]) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        problems[_NO_TEXT].append(path.name)
        return []
    return [line for line in (line.strip() for line in lines) if line]


def _label(line: str, num_classes: int, has_keypoints: bool) -> tuple[int, tuple[float, ...]] | str:
    """Class and box (x1, y1, x2, y2) in 0..1; or what is wrong with the line."""
    try:
        first, *values = map(float, line.split())
    except ValueError:
        return _NO_LABEL
    if len(values) > 4 and has_keypoints:
        values = values[:4]
    if not all(map(is_number, (first, *values))) or not (
        len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)
    ):
        return _NO_LABEL
    if first != int(first) or not 0 <= first < num_classes:
        return _NO_CLASS
    if min(values) < -_SHARE_SLACK or max(values) > 1 + _SHARE_SLACK:
        return _NO_SHARE
    if len(values) == 4:
        x, y, width, height = values
        return int(first), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return int(first), (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
