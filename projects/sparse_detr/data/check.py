"""A look at COCO-format data before the first step: all that is wrong with it, in one message.

What would end a run half-way, or teach or measure something else than its owner thinks, is an
error. What is only dropped or clipped is reported with the records it concerns.
"""

from __future__ import annotations

import filecmp
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

from detectron2.utils import comm

from ..errors import UserError, listed
from .coco import check_path, in_order, is_area, is_number, load_coco, read_annotations
from .image import ImageError, image_size
from .report import Report, is_id, record_id, to_mend

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 10.0


# How many objects are evaluated, detected and matched: keys of a config, and what they are where it,
# or there being none, leaves them out. The first counts per image and class, the others per image.
_EVALUATED = "dataloader.evaluator.max_dets_per_image"
LIMITS = {_EVALUATED: 100, "model.max_detections": 100, "model.transformer.query_selection.num_queries": 300}


def category_names(json_file: str) -> list[str]:
    """The names of a JSON's categories, in the order of their ids: class k is the k-th name."""
    names = _names(read_annotations(json_file))
    if not names:
        raise UserError(f"{json_file} has no categories: its annotations belong to no class")
    return names


def check_data(
    train: tuple[str, str] | None = None,
    val: tuple[str, str] | None = None,
    *,
    limits: Mapping[str, int] = LIMITS,
) -> None:
    """Checks data sets, each a JSON file and its image folder, and logs what it finds.

    Call it in every process: the main one looks, and all raise what it finds.

    Args:
        limits: how many objects are evaluated, detected and matched; keys as in ``LIMITS``.

    Raises:
        ValueError: names everything that must be mended.
    """
    error = _check_and_log(train, val, limits) if comm.is_main_process() else None
    error = comm.all_gather(error)[0]  # the other processes wait for the answer
    if error:
        raise UserError(error)


def _check_and_log(
    train: tuple[str, str] | None, val: tuple[str, str] | None, limits: Mapping[str, int]
) -> str | None:
    try:
        reports = [check_coco(*train, limits=limits)] if train else []
        reports += [check_coco(*val, evaluated=True, limits=limits)] if val else []
    except ValueError as error:
        return str(error)
    if train and val:
        _compare(*reports)
    for report in reports:
        logger.info(report.summary())
        for remark in report.remarks:
            logger.warning(remark)
    errors = [error for report in reports for error in report.errors]
    return to_mend(errors) if errors else None


def check_coco(
    json_file: str, image_root: str, *, evaluated: bool = False, limits: Mapping[str, int] = LIMITS
) -> Report:
    """Checks one data set: reads the header of every image file, and runs the loader.

    Args:
        json_file: annotations in COCO format.
        image_root: folder that the JSON's file names are relative to.
        evaluated: it is a validation set: boxes reach the evaluation as they are.
        limits: see ``check_data``.

    Raises:
        ValueError: the JSON cannot be read, is not in COCO format, or the folder does not exist.
    """
    check_path(image_root, "image folder", "its file names may have folders in them")
    if not os.path.isdir(image_root):
        raise UserError(f"there is no image folder {os.path.abspath(image_root)}")
    report = Report(str(json_file), str(image_root), read_annotations(json_file))
    _check_categories(report)
    _check_images(report)
    _check_annotations(report)
    _check_boxes(report, evaluated)
    _check_numbers(report, limits)
    _check_files(report)
    _check_loader(report)
    return report


def _check_categories(report: Report) -> None:
    categories = report.content["categories"]
    nameless = [
        c for c in categories if record_id(c) is None or not isinstance(c.get("name"), str) or not c["name"]
    ]
    report.add(
        "categories without an id or a name",
        nameless,
        "add them, the name as a text, the id as a whole number or a text",
        fatal=True,
    )
    ids = [c.get("id") for c in categories]
    report.add("category ids twice", _repeated(ids), "give each class an id of its own", fatal=True)
    report.add(
        "class names twice",
        _repeated(c.get("name") for c in categories),
        "their APs are reported under one name",
    )
    used = {record_id(a, "category_id") for a in report.content["annotations"]}
    if used <= {record_id(c) for c in categories}:  # others are an error of their own
        unused = [c.get("name") for c in categories if record_id(c) not in used]
        report.add("classes without an annotation", unused, "they stay classes, and have no AP")
    if not categories:
        report.fail("there is no category", "name the classes that the annotations belong to")


def _check_images(report: Report) -> None:
    images = report.content["images"]
    named = [i.get("file_name") or f"image {i.get('id')!r}" for i in images]
    _check_field(report, "images", images, named, "id", is_id, _AN_ID)
    _check_field(report, "images", images, named, "file_name", _is_text, "a text")
    for key in ("width", "height"):
        _check_field(report, "images", images, named, key, _is_size, "a positive number of pixels")
    report.add(
        "image ids twice",
        _repeated(i.get("id") for i in images),
        "give each image an id of its own",
        fatal=True,
    )
    repeated = _repeated(i.get("file_name") for i in images)
    report.add("file names twice", repeated, "kept: these images count that often")


_AN_ID = "a whole number or a text"


def _check_field(
    report: Report,
    kind: str,
    records: Iterable[dict],
    names: Iterable[object],
    key: str,
    sound: Callable[[object], bool],
    expected: str,
) -> None:
    """``key`` is there in all ``records``, which messages call ``names``, and is what is ``expected``."""
    missing, wrong = [], []
    for record, name in zip(records, names, strict=True):
        value = record.get(key)
        if value is None:
            missing.append(name)
        elif not sound(value):
            wrong.append(f"{name}: {value!r}, {type(value).__name__}")
    report.add(f"{kind} without a proper {key}", missing, f"add the {key}", fatal=True)
    report.add(f"{kind} whose {key} is not {expected}", wrong, f"write it as {expected}", fatal=True)


def _check_annotations(report: Report) -> None:
    annotations = report.content["annotations"]
    named = [_annotation(a) for a in annotations]
    if not annotations:
        report.fail("there is no annotation", "nothing can be learned or measured")
    elif all(a.get("iscrowd") for a in annotations):
        report.fail(
            f"all annotations ({len(annotations)}) are crowd regions (iscrowd is not 0)",
            "nothing can be learned or measured: write 0 for single objects",
        )
    for key in ("image_id", "category_id"):
        _check_field(report, "annotations", annotations, named, key, is_id, _AN_ID)
    report.add(
        "annotation ids twice",
        _repeated(a.get("id") for a in annotations),
        "number them anew",
        fatal=True,
    )
    lost = _check_references(report, "image_id", {record_id(i) for i in report.content["images"]})
    report.add("annotations of images that are not in the file", lost, "left out")
    known = {c["id"]: c.get("name") for c in report.content["categories"] if record_id(c) is not None}
    lost = _check_references(report, "category_id", known.keys())
    names = listed([f"{key!r} {name}" for key, name in known.items()], limit=20)
    report.add("annotations of unknown categories", lost, f"known are {names}", fatal=True)
    ignored = [_annotation(a) for a in annotations if a.get("ignore")]
    report.add("annotations with the key ignore", ignored, "not supported: use iscrowd", fatal=True)
    unclear = [
        f"{_annotation(a)}: {a['iscrowd']!r}" for a in annotations if a.get("iscrowd", 0) not in (0, 1)
    ]
    report.add("annotations whose iscrowd is not 0 or 1", unclear, "write 0 or 1", fatal=True)
    crowd = [_annotation(a) for a in annotations if a.get("iscrowd")]
    report.add("crowd regions", crowd, "not trained on; detections inside are not judged")
    areas = [
        f"{_annotation(a)}: {a['area']!r}" for a in annotations if "area" in a and not is_area(a["area"])
    ]
    report.add(
        "annotations whose area is not a positive finite number (at most 1e10)",
        areas,
        "the evaluation takes the box's area instead, for what is small, medium and large",
    )


def _check_references(report: Report, key: str, known: Iterable[object]) -> list[str]:
    """The annotations whose ``key`` is not among ``known``; an error where only the type differs."""
    known = set(known)
    as_text = {str(value) for value in known}
    lost, mistyped = [], []
    for annotation in report.content["annotations"]:
        value = record_id(annotation, key)
        if value is None or value in known:
            continue
        if str(value) in as_text:
            mistyped.append(_annotation(annotation) + f": {value!r}" * (key != "image_id"))
        else:
            lost.append(_annotation(annotation) + f": category {value!r}" * (key != "image_id"))
    owner = "image" if key == "image_id" else "category"
    report.add(
        f'annotations whose {key} is a text and the {owner}\'s id a number ("1" and 1), or the reverse',
        mistyped,
        "write both alike",
        fatal=True,
    )
    return lost


def _check_boxes(report: Report, evaluated: bool) -> None:
    """Boxes are (x, y, width, height) in pixels of the image."""
    sizes = {record_id(i): (i.get("width"), i.get("height")) for i in report.content["images"]}
    broken, empty, outside, clipped, tiny = [], [], [], [], []
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
            usable += not annotation.get("iscrowd")
            if min(width, height) < 1:
                tiny.append(name)
            # a pixel is what conventions differ by
            if x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
                clipped.append(name)
    dropped = "kept by the evaluation, where they can only be missed" if evaluated else "dropped"
    kept = "kept by the evaluation as they are" if evaluated else "clipped to the image"
    report.add("boxes that are not four finite numbers", broken, "expected [x, y, w, h]", fatal=True)
    report.add("boxes without an area", empty, dropped)
    report.add("boxes outside their image", outside, dropped)
    normalised = bool(objects) and all(0 <= value <= 1 for box in objects for value in box)
    if not normalised:
        report.add(
            "boxes narrower or lower than a pixel",
            tiny,
            "kept, but there is nothing to see in them: are they slips, or in other units?",
        )
    if len(clipped) > len(objects) / 2:
        kept += "; they are more than half of all boxes: are they x1, y1, x2, y2?"
    report.add("boxes that reach over the border of their image", clipped, kept)
    if normalised:
        report.fail("coordinates look normalised", "expected pixels (x, y, width, height)")
    elif objects and not usable:
        report.fail("not one annotation can be used", "nothing can be learned or measured")


def _check_numbers(report: Report, limits: Mapping[str, int]) -> None:
    """Objects per image, against what can be matched, detected and counted."""
    objects = [a for a in report.content["annotations"] if not a.get("iscrowd")]
    names = {record_id(i): i.get("file_name") for i in report.content["images"]}
    per_image = Counter(record_id(a, "image_id") for a in objects)
    per_class: Counter = Counter()  # of the most frequent class in each image
    for (image, _), count in Counter(
        (record_id(a, "image_id"), record_id(a, "category_id")) for a in objects
    ).items():
        per_class[image] = max(per_class[image], count)

    def above(image: int | str) -> bool:
        counts = {key: (per_class if key == _EVALUATED else per_image)[image] for key in limits}
        return any(counts[key] > limit for key, limit in limits.items())

    crowded = [image for image in names if image is not None and above(image)]
    if not crowded:
        return
    most, of_a_class = (max(counts[image] for image in crowded) for counts in (per_image, per_class))
    report.add(
        "images with more objects than the limits allow",
        [f"{names[image]}: {per_image[image]}" for image in crowded],
        "those above can only be missed. The limits are "
        + ", ".join(f"{key}={limit}" for key, limit in limits.items())
        + f": raise them to {most}, the most of an image ({of_a_class} of one class, which is what the "
        "evaluator's limit counts)",
    )


def _check_loader(report: Report) -> None:
    """Loads the records as training does, once nothing else is wrong; what is raised is one error."""
    if report.errors:
        return
    try:
        load_coco(report.json_file, report.image_root)
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        report.fail(f"the records cannot be loaded ({words})", "mend the record")


def _check_files(report: Report) -> None:
    """Existence, readable header and size; pixels are decoded only when training reads them."""
    missing, resized = [], []
    unreadable = defaultdict(list)  # by what helps
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
            size = image_size(path)
        except ImageError as error:
            unreadable[error.advice].append(f"{name}: {error.problem}")
            continue
        expected = (image.get("width"), image.get("height"))
        if size != expected and all(map(_is_size, expected)):
            shown = "{}x{}".format(*expected)
            resized.append(f"{name}: {size[0]}x{size[1]}, in the JSON {shown}")
    root = os.path.abspath(report.image_root)
    report.add("missing image files", missing, f"file names are looked for in {root}", fatal=True)
    for advice, names in unreadable.items():
        report.add("image files that cannot be read", names, advice, fatal=True)
    report.add(
        "image files of another size (width x height) than in the JSON",
        resized,
        "the boxes may not fit: mend width and height, or the images",
        fatal=True,
    )


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
    return [str(c.get("name")) for c in in_order(categories)]


def _paths(report: Report) -> list[str]:
    names = (i.get("file_name") for i in report.content["images"])
    return [os.path.join(report.image_root, name) for name in names if isinstance(name, str)]


def _name_and_size(path: str) -> tuple[str, int]:
    try:
        return os.path.basename(path), os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: no file can have that name
        return os.path.basename(path), -1


def _same_file(first: str, second: str) -> bool:
    try:
        return os.path.samefile(first, second) or filecmp.cmp(first, second, shallow=False)
    except (OSError, ValueError):  # one is missing, which is reported elsewhere
        return False


def _repeated(values: Iterable[object]) -> list[object]:
    counts = Counter(value for value in values if isinstance(value, int | str))
    return [value for value, count in counts.items() if count > 1]


def _is_size(value: object) -> bool:
    return is_number(value) and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def _annotation(annotation: dict) -> str:
    return f"annotation {annotation.get('id')!r} of image {annotation.get('image_id')!r}"
