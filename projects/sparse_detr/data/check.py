"""A look at COCO-format data before the first step: all that is wrong with it, in one message.

What would end a run half-way, or teach or measure something else than its owner thinks, is an
error. What is only dropped or clipped is reported with the records it concerns.
"""

from __future__ import annotations

import filecmp
import json
import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable

from detectron2.utils import comm
from PIL import Image

from ..errors import UserError, listed
from .report import Report, is_id, record_id

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 10.0
_EXIF_ORIENTATION, _EXIF_TRANSPOSED = 0x0112, (5, 6, 7, 8)


def read_annotations(json_file: str) -> dict:
    """The parsed JSON.

    Raises:
        ValueError: it cannot be read, or is not in COCO format.
    """
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(
            f"cannot read the annotations {os.path.abspath(json_file)}: {error.strerror}"
        ) from None
    except ValueError as error:
        raise UserError(f"{json_file} is not a JSON file: {error}") from None
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) and all(isinstance(x, dict) for x in content[key]) for key in keys
    ):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{json_file} is not in COCO format: expected an object with the lists of records "
            f"{', '.join(keys)}, found {found}. Other formats (Pascal VOC, YOLO) must be converted"
        )
    return content


def category_names(json_file: str) -> list[str]:
    """The names of a JSON's categories, in the order of their ids: class k is the k-th name."""
    names = _names(read_annotations(json_file))
    if not names:
        raise UserError(f"{json_file} has no categories: its annotations belong to no class")
    return names


def check_data(train: tuple[str, str] | None = None, val: tuple[str, str] | None = None) -> None:
    """Checks data sets, each a JSON file and its image folder, and logs what it finds.

    Call it in every process: the main one looks, and all raise what it finds.

    Raises:
        ValueError: names everything that must be mended.
    """
    error = _check_and_log(train, val) if comm.is_main_process() else None
    error = comm.all_gather(error)[0]  # the other processes wait for the answer
    if error:
        raise UserError(error)


def _check_and_log(train: tuple[str, str] | None, val: tuple[str, str] | None) -> str | None:
    try:
        reports = [check_coco(*train)] if train else []
        reports += [check_coco(*val, evaluated=True)] if val else []
    except ValueError as error:
        return str(error)
    if train and val:
        _compare(*reports)
    for report in reports:
        logger.info(report.summary())
        for remark in report.remarks:
            logger.warning(remark)
    errors = [error for report in reports for error in report.errors]
    if not errors:
        return None
    problems = "".join(f"\n  {number}. {text}" for number, text in enumerate(errors, 1))
    return f"the data must be mended first:{problems}"


def check_coco(json_file: str, image_root: str, *, evaluated: bool = False) -> Report:
    """Checks one data set; reads the header of every image file.

    Args:
        json_file: annotations in COCO format.
        image_root: folder that the JSON's file names are relative to.
        evaluated: it is a validation set: boxes reach the evaluation as they are.

    Raises:
        ValueError: the JSON cannot be read, is not in COCO format, or the folder does not exist.
    """
    if not os.path.isdir(image_root):
        raise UserError(f"there is no image folder {os.path.abspath(image_root)}")
    report = Report(str(json_file), str(image_root), read_annotations(json_file))
    _check_categories(report)
    _check_images(report)
    _check_annotations(report)
    _check_boxes(report, evaluated)
    _check_files(report)
    return report


def _check_categories(report: Report) -> None:
    categories = report.content["categories"]
    nameless = [
        c for c in categories if record_id(c) is None or not isinstance(c.get("name"), str) or not c["name"]
    ]
    report.add("categories without an id or a name", nameless, "add them, the name as a text", fatal=True)
    ids = [c.get("id") for c in categories]
    report.add("category ids twice", _repeated(ids), "give each class an id of its own", fatal=True)
    report.add(
        "class names twice",
        _repeated(c.get("name") for c in categories),
        "their APs are reported under one name",
    )
    used = {record_id(a, "category_id") for a in report.content["annotations"]}
    unused = [c.get("name") for c in categories if record_id(c) not in used]
    report.add("classes without an annotation", unused, "they stay classes, and have no AP")
    if not categories:
        report.fail("there is no category", "name the classes that the annotations belong to")


def _check_images(report: Report) -> None:
    images = report.content["images"]
    for key, sound in (
        ("id", is_id),
        ("file_name", lambda value: isinstance(value, str)),
        ("width", _is_size),
        ("height", _is_size),
    ):
        lacking = [i.get("file_name") or f"image {i.get('id')}" for i in images if not sound(i.get(key))]
        report.add(f"images without a proper {key}", lacking, f"add the {key}", fatal=True)
    report.add(
        "image ids twice",
        _repeated(i.get("id") for i in images),
        "give each image an id of its own",
        fatal=True,
    )
    repeated = _repeated(i.get("file_name") for i in images)
    report.add("file names twice", repeated, "kept: these images count that often")


def _check_annotations(report: Report) -> None:
    annotations = report.content["annotations"]
    if all(a.get("iscrowd") for a in annotations):
        report.fail("there is no annotation", "nothing can be learned or measured")
    for key in ("id", "image_id", "category_id"):
        lacking = [_annotation(a) for a in annotations if not is_id(a.get(key))]
        report.add(f"annotations without a proper {key}", lacking, f"add the {key}", fatal=True)
    report.add(
        "annotation ids twice",
        _repeated(a.get("id") for a in annotations),
        "number them anew",
        fatal=True,
    )
    images = {record_id(i) for i in report.content["images"]}
    as_text = {str(image) for image in images}
    lost: list[str] = []
    mistyped: list[str] = []
    for a in annotations:
        image = record_id(a, "image_id")
        if image is not None and image not in images:
            (mistyped if str(image) in as_text else lost).append(_annotation(a))
    report.add("annotations of images that are not in the file", lost, "left out")
    report.add(
        'annotations whose image_id is a text and the image\'s id a number ("1" and 1), or the reverse',
        mistyped,
        "write both alike",
        fatal=True,
    )
    known = {c["id"]: c.get("name") for c in report.content["categories"] if record_id(c) is not None}
    unknown = [
        f"{_annotation(a)}: category {a['category_id']}"
        for a in annotations
        if record_id(a, "category_id") not in (None, *known)
    ]
    names = listed([f"{key} {name}" for key, name in known.items()], limit=20)
    report.add("annotations of unknown categories", unknown, f"known are {names}", fatal=True)
    ignored = [_annotation(a) for a in annotations if a.get("ignore")]
    report.add("annotations with the key ignore", ignored, "not supported: use iscrowd", fatal=True)
    unclear = [_annotation(a) for a in annotations if a.get("iscrowd", 0) not in (0, 1)]
    report.add("annotations whose iscrowd is not 0 or 1", unclear, "write 0 or 1", fatal=True)
    crowd = [_annotation(a) for a in annotations if a.get("iscrowd")]
    report.add("crowd regions", crowd, "not trained on; detections inside are not judged")
    cut = [_annotation(a) for a in annotations if _is_broken_polygon(a.get("segmentation"))]
    report.add("annotations whose polygon has less than three points", cut, "left out")


def _check_boxes(report: Report, evaluated: bool) -> None:
    """Boxes are (x, y, width, height) in pixels of the image."""
    sizes = {record_id(i): (i.get("width"), i.get("height")) for i in report.content["images"]}
    broken, empty, outside, clipped = [], [], [], []
    objects, usable = [], 0  # boxes that are no crowd regions; how many of them reach training
    for annotation in report.content["annotations"]:
        box = annotation.get("bbox")
        name = f"{_annotation(annotation)}: {box}"
        if not _is_box(box):
            broken.append(name)
            continue
        if not annotation.get("iscrowd"):
            objects.append(box)
        x, y, width, height = box
        size = sizes.get(record_id(annotation, "image_id"), (None, None))
        if width <= 0 or height <= 0:
            empty.append(name)
        elif not all(map(_is_size, size)):
            continue
        elif x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
            outside.append(name)
        else:
            cut = _is_broken_polygon(annotation.get("segmentation"))
            usable += not (cut or annotation.get("iscrowd"))
            # a pixel is what conventions differ by
            if x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
                clipped.append(name)
    dropped = "kept by the evaluation, where they can only be missed" if evaluated else "dropped"
    kept = "kept by the evaluation as they are" if evaluated else "clipped to the image"
    report.add("boxes that are not four finite numbers", broken, "expected [x, y, w, h]", fatal=True)
    report.add("boxes without an area", empty, dropped)
    report.add("boxes outside their image", outside, dropped)
    if len(clipped) > len(objects) / 2:
        kept += "; they are more than half of all boxes: are they x1, y1, x2, y2?"
    report.add("boxes that reach over the border of their image", clipped, kept)
    if objects and all(0 <= value <= 1 for box in objects for value in box):
        report.fail("coordinates look normalised", "expected pixels (x, y, width, height)")
    elif objects and not usable:
        report.fail("not one annotation can be used", "nothing can be learned or measured")


def _check_files(report: Report) -> None:
    """Existence, readable header and size; pixels are decoded only when training reads them."""
    missing, unreadable, resized = [], [], []
    images = [i for i in report.content["images"] if isinstance(i.get("file_name"), str)]
    reported = time.monotonic()
    for number, image in enumerate(images):
        if time.monotonic() - reported > _PROGRESS_SECONDS:
            reported = time.monotonic()
            logger.info("checking image files: %d of %d", number, len(images))
        name = image["file_name"]
        path = os.path.join(report.image_root, name)
        if not os.path.isfile(path):
            missing.append(name)
            continue
        try:
            size = _image_size(path)
        except Exception as error:  # Pillow's own and those of its format plug-ins
            unreadable.append(f"{name}: {error}")
            continue
        expected = (image.get("width"), image.get("height"))
        if size != expected and all(map(_is_size, expected)):
            shown = "{}x{}".format(*expected)
            resized.append(f"{name}: {size[0]}x{size[1]}, in the JSON {shown}")
    root = os.path.abspath(report.image_root)
    report.add("missing image files", missing, f"file names are looked for in {root}", fatal=True)
    report.add("image files that cannot be read", unreadable, "replace them", fatal=True)
    report.add(
        "image files of another size (width x height) than in the JSON",
        resized,
        "the boxes may not fit: mend width and height, or the images",
        fatal=True,
    )


def _image_size(path: str) -> tuple[int, int]:
    """Width and height as training sees them, after the rotation that the camera noted."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":  # "I", "I;16", "F"
            raise ValueError("more than 8 bits per channel, which detectron2 would clip at 255: convert it")
        width, height = image.size
        if image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TRANSPOSED:
            return height, width
        return width, height


def _compare(train: Report, val: Report) -> None:
    """Classes and images of the two sets."""
    names, others = _names(train.content), _names(val.content)
    if names != others:
        val.fail(
            f"the classes in the order of their ids ({listed(others)}) are not the training "
            f"set's ({listed(names)})",
            "copy the training set's categories, and its ids into the annotations",
        )
    known = defaultdict(list)  # by name and size, which a copy keeps
    for path in _paths(train):
        known[_name_and_size(path)].append(path)
    shared = [
        path
        for path in _paths(val)
        if any(_same_file(path, other) for other in known.get(_name_and_size(path), ()))
    ]
    val.add(
        "validation images are training images",
        [os.path.basename(path) for path in shared],
        "the evaluation will look better than it is",
    )


def _names(content: dict) -> list[str]:
    categories = [c for c in content["categories"] if is_id(c.get("id"))]
    ordered = sorted(categories, key=lambda c: (isinstance(c["id"], str), c["id"]))
    return [str(c.get("name")) for c in ordered]


def _paths(report: Report) -> list[str]:
    names = (i.get("file_name") for i in report.content["images"])
    return [os.path.join(report.image_root, name) for name in names if isinstance(name, str)]


def _name_and_size(path: str) -> tuple[str, int]:
    try:
        return os.path.basename(path), os.stat(path).st_size
    except OSError:
        return os.path.basename(path), -1


def _same_file(first: str, second: str) -> bool:
    try:
        return os.path.samefile(first, second) or filecmp.cmp(first, second, shallow=False)
    except OSError:  # one is missing, which is reported elsewhere
        return False


def _repeated(values: Iterable[object]) -> list[object]:
    counts = Counter(value for value in values if isinstance(value, int | str))
    return [value for value, count in counts.items() if count > 1]


def _is_size(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
    )


def _is_broken_polygon(value: object) -> bool:
    """detectron2 leaves such annotations out, although their boxes may be sound."""
    if not isinstance(value, list) or not value:
        return False
    return not any(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in value)


def _annotation(annotation: dict) -> str:
    return f"annotation {annotation.get('id')} of image {annotation.get('image_id')}"
