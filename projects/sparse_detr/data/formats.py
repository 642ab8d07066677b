"""YOLO folders, Pascal VOC and several COCO files, each read as one set in COCO format.

What cannot be read as its owner means it is collected in the ``Report`` that is returned.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import UserError, listed
from .coco import in_order, is_number, read_annotations
from .image import EXTENSIONS, ImageError, image_size
from .report import Report, is_id, record_id

IMAGE_ENDINGS = (*EXTENSIONS, ".mpo")

# The names under which exports have the two splits, the usual first.
_SPLITS = {"train": ("train", "training", "trainval", "default"), "val": ("val", "valid", "validation")}
_SHARE_SLACK = 0.01  # of rounding, in labels between 0 and 1


# YOLO


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
    report = _report(f"{data_yaml} ({split})", images, names)
    labels = {image: _label_file(image) for image in images}
    found = [image for image in images if labels[image].is_file()]
    if images and not found:
        report.fail(
            f"not one of the {len(images)} images has a label file",
            f"expected {labels[images[0]]} for {images[0]}: is the folder missing, or elsewhere?",
        )
        return report
    problems: dict[str, list[str]] = {key: [] for key in _LABEL_PROBLEMS}
    unreadable: list[str] = []
    for image in images:
        record = _add_image(report, image, unreadable)
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
            _add_annotation(report, record, label, box)
    _tell_unreadable(report, unreadable)
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
    value = next((content[key] for key in _SPLITS[split] if content.get(key)), None)
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


# Pascal VOC


def voc_classes(source: str | Sequence[str]) -> list[str]:
    """The names in all XML files of both splits, in alphabetical order: VOC files have no list of them."""
    names: set[str] = set()
    for split in _SPLITS:
        for path in _voc_files(source, split) or ():
            file = _voc_file(path)
            names.update(name for name, _ in (file.objects if file else ()) if name)
    if not names:
        raise UserError(f"data.voc={source}: there is no object in its XML files")
    return sorted(names)


def has_voc_split(source: str | Sequence[str], split: str) -> bool:
    return _voc_files(source, split) is not None


def read_voc(source: str | Sequence[str], split: str, classes: Sequence[str]) -> Report:
    """One split of Pascal VOC data, "train" or "val".

    Pixels are counted from 1 in VOC; a set with a box that begins at 0 counts from 0. An XML file without a
    size has that of its image. Objects that are ``difficult`` are objects.

    Args:
        source: a folder with ``ImageSets/Main``, ``Annotations`` and ``JPEGImages``; one with the folders
            ``train`` and ``valid`` of XML files; one of XML files, which is the training set; or the training
            set and the validation set, each a folder or a list of ``ImageSets/Main``.
        classes: the names, class k is the k-th.

    Raises:
        UserError: there are no such files.
    """
    files = _voc_files(source, split)
    if files is None:
        raise UserError(f"data.voc={source} has no {split} set")
    parsed = {path: _voc_file(path) for path in files}
    images = {path: _voc_image(path, file) for path, file in parsed.items()}
    report = _report(f"data.voc={source} ({split})", list(images.values()), classes)
    missing: list[str] = []
    broken: list[str] = []
    incomplete: list[str] = []
    unreadable: list[str] = []
    numbers = {name: number for number, name in enumerate(classes)}
    unknown: Counter[str] = Counter()
    boxes = []
    for path, image in images.items():
        file = parsed[path]
        if file is None:
            (broken if path.is_file() else missing).append(path.name)
            continue
        record = _add_image(report, image, unreadable, file.size)
        if record is None:
            continue
        for name, corners in file.objects:
            if name is None or corners is None:
                incomplete.append(f"{path.name}: {name or 'an object'}")
            elif name not in numbers:
                unknown[name] += 1
            else:
                boxes.append((record, numbers[name], corners))
    first = 1 if all(min(corners[:2]) >= 1 for *_, corners in boxes) else 0
    for record, number, (left, top, right, bottom) in boxes:
        box = [left - first, top - first, right - (left - first), bottom - (top - first)]
        _add_annotation(report, record, number, box)
    report.add(
        "images without their XML file", missing, "add it, or take the image out of the list", fatal=True
    )
    report.add("XML files that cannot be read", broken, "replace them", fatal=True)
    report.add(
        "objects without a name or a bndbox of xmin, ymin, xmax, ymax",
        incomplete,
        "mend or delete them",
        fatal=True,
    )
    report.add(
        "objects of other classes",
        [f"{name} {count}" for name, count in unknown.items()],
        f"left out; the classes are {listed(list(classes), 20)}",
    )
    _tell_unreadable(report, unreadable)
    return report


def _voc_files(source: str | Sequence[str], split: str) -> list[Path] | None:
    """The XML files of a split, in order; None if it has none."""
    if not isinstance(source, str | os.PathLike):
        pair = list(source)
        if not 1 <= len(pair) <= 2:
            raise UserError(
                f"data.voc={pair}: expected one path, or the training set's and the validation set's"
            )
        if split == "val" and len(pair) == 1:
            return None
        return _voc_set(Path(pair[split == "val"]))
    root = Path(source)
    lists = root / "ImageSets" / "Main"
    if lists.is_dir():
        found = {path.stem.lower(): path for path in lists.glob("*.txt")}
        return next((_voc_set(found[name]) for name in _SPLITS[split] if name in found), None)
    for name in _SPLITS[split]:
        if (root / name).is_dir():
            return _voc_set(root / name)
    return _voc_set(root) if split == "train" else None


def _voc_set(path: Path) -> list[Path]:
    """XML files in a folder, or those of the names in a list of ``ImageSets/Main``."""
    if path.is_file() and path.suffix == ".txt":
        folder = path.parent.parent.parent / "Annotations"
        return [folder / f"{name}.xml" for name in _listed_names(path)]
    files = sorted(path.rglob("*.xml"))
    if not files:
        raise UserError(
            f"data.voc: {os.path.abspath(path)} "
            f"{'holds no XML files' if path.is_dir() else 'does not exist'}: expected a folder with "
            "ImageSets/Main, Annotations and JPEGImages, one with train/ and valid/, one of XML files, or "
            "two: [train,val]"
        )
    return files


def _listed_names(path: Path) -> Iterator[str]:
    """Of a list such as train.txt; in those of single classes a 1, 0 or -1 follows each name."""
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        words = line.split()
        if len(words) > 1 and words[-1] in ("1", "0", "-1"):
            words.pop()
        if words:
            yield " ".join(words)


class _VocFile(NamedTuple):
    """What an XML file says.

    Attributes:
        image: name of the image, or "".
        size: width and height, or None.
        objects: name and (xmin, ymin, xmax, ymax) of each; None for what is missing.
    """

    image: str
    size: tuple[int, int] | None
    objects: list[tuple[str | None, list[float] | None]]


def _voc_file(path: Path) -> _VocFile | None:
    """None if it cannot be read."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, ValueError, LookupError):  # the last two: its encoding
        return None
    width, height = (_number(root.findtext(f"size/{side}")) or 0 for side in ("width", "height"))
    objects = []
    for element in root.iterfind("object"):
        name = (element.findtext("name") or "").strip()
        corners = [_number(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        whole = [corner for corner in corners if corner is not None]
        objects.append((name or None, whole if len(whole) == 4 else None))
    size = (int(width), int(height)) if min(width, height) >= 1 else None
    return _VocFile((root.findtext("filename") or "").strip(), size, objects)


def _voc_image(path: Path, file: _VocFile | None) -> Path:
    """The image of an XML file: beside it, or in the folder of images beside its folder."""
    named = (file.image if file else "").replace("\\", "/")
    names = [named.rpartition("/")[2]] if named else []
    names += [path.stem + form for ending in IMAGE_ENDINGS for form in (ending, ending.upper())]
    folders = [path.parent]
    for level, folder in enumerate(path.parents[:3]):
        inside = path.parent.relative_to(folder.parent).parts[1:] if folder != folder.parent else ()
        folders += [
            folder.parent.joinpath(name, *inside)
            for name in ("JPEGImages", "images", "Images", "data")
            if level == 0 or folder.name in ("Annotations", "annotations", "labels")
        ]
    places = (folder / name for folder in folders for name in names)
    usual = next((folder for folder in folders[1:] if folder.is_dir()), folders[0])
    return next((place for place in places if place.is_file()), usual / names[0])


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if is_number(value) else None


# COCO


def merge_coco(files: Sequence[str], folders: str | Sequence[str]) -> Report:
    """Several COCO files as one set: classes of one name are one, images and annotations get new ids.

    Args:
        folders: of the images, one for each file, or one for all.

    Raises:
        UserError: a file cannot be read, the numbers differ, or the names of classes contradict each other.
    """
    folders = [folders] * len(files) if isinstance(folders, str) else list(folders)
    if len(folders) != len(files):
        raise UserError(
            f"{len(files)} annotation files ({listed(list(map(str, files)), 3)}) and {len(folders)} image "
            "folders: pass a folder for each file, or one for all"
        )
    contents = [read_annotations(file) for file in files]
    names = _merged_names(files, contents)
    roots = [os.path.abspath(folder) for folder in folders]
    common = os.path.commonpath(roots)
    report = Report(" + ".join(map(str, files)), common, {"images": [], "annotations": []})
    numbers = {name: number for number, name in enumerate(names, 1)}
    report.content["categories"] = [{"id": number, "name": name} for name, number in numbers.items()]
    for file, content, root in zip(files, contents, roots):
        classes = {record_id(c): numbers[c["name"]] for c in content["categories"] if "name" in c}
        images: dict[object, int] = {}
        for image in content["images"]:
            record = {**image, "id": len(report.content["images"]) + 1}
            if isinstance(name := image.get("file_name"), str):
                record["file_name"] = os.path.relpath(os.path.join(root, name), common)
            if not is_id(image.get("id")) or image["id"] in images:
                report.add(
                    f"images of {file} without an id of their own", [name or image], "add it", fatal=True
                )
            images[image.get("id")] = record["id"]
            report.content["images"].append(record)
        for annotation in content["annotations"]:
            record = {**annotation, "id": len(report.content["annotations"]) + 1}
            for key, known in (("image_id", images), ("category_id", classes)):
                value = record_id(annotation, key)
                # what the file does not know stays unknown, for the check to tell
                record[key] = known.get(value, f"{value} of {file}")
            report.content["annotations"].append(record)
    return report


def _merged_names(files: Sequence[str], contents: Sequence[dict]) -> list[str]:
    """The classes of all files, in the order of their first appearance."""
    first: dict[str, tuple[str, str]] = {}  # by the name as people compare it: the name, its file
    for file, content in zip(files, contents):
        categories = [
            c for c in content["categories"] if is_id(c.get("id")) and isinstance(c.get("name"), str)
        ]
        own = [c["name"] for c in in_order(categories)]
        if twice := [name for name, count in Counter(own).items() if count > 1]:
            raise UserError(
                f"{file} has several classes of one name ({listed(twice, 5)}): files are merged by the names "
                "of their classes, give each its own"
            )
        for name in own:
            known, where = first.setdefault(" ".join(name.casefold().split()), (name, str(file)))
            if known != name:
                raise UserError(
                    f"the class {known!r} of {where} and {name!r} of {file} differ in case or blanks alone: "
                    "files are merged by the names of their classes, write both alike"
                )
    return [name for name, _ in first.values()]


def select_classes(report: Report, classes: Sequence[str]) -> None:
    """Leaves ``classes`` alone in a set, in this order, and all images.

    Raises:
        UserError: the set does not have one of them.
    """
    categories = report.content["categories"]
    numbers = {name: number for number, name in enumerate(classes, 1)}
    known = {record_id(c): c.get("name") for c in categories}
    if missing := [name for name in classes if name not in known.values()]:
        raise UserError(
            f"data.classes: {listed(missing, 5)} {'are' if len(missing) > 1 else 'is'} not among the classes "
            f"of {report.json_file} ({listed([str(name) for name in known.values()], 20)})"
        )
    kept, dropped = [], Counter[str]()
    for annotation in report.content["annotations"]:
        name = known.get(record_id(annotation, "category_id"))
        if name is None:  # unknown, for the check to tell
            kept.append(annotation)
        elif name in numbers:
            kept.append({**annotation, "category_id": numbers[name]})
        else:
            dropped[str(name)] += 1
    report.content.update(
        annotations=kept, categories=[{"id": number, "name": name} for name, number in numbers.items()]
    )
    report.add(
        f"data.classes leaves out boxes of {len(set(known.values()) - numbers.keys())} other classes",
        [f"{name} {count}" for name, count in dropped.most_common()],
        "their images stay",
    )


# What the readers share


def _report(label: str, images: Sequence[Path], classes: Sequence[str]) -> Report:
    root = os.path.commonpath([image.absolute().parent for image in images]) if images else "."
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    return Report(label, root, {"images": [], "annotations": [], "categories": categories})


def _add_image(
    report: Report, image: Path, unreadable: list[str], size: Sequence[int] | None = None
) -> dict[str, Any] | None:
    """The record of an image, with the size that is given, or the file's; None if it has none."""
    try:
        width, height = size or image_size(image)
    except ImageError as error:
        unreadable.append(f"{image.name}: {error.problem}")
        return None
    name = os.path.relpath(image.absolute(), report.image_root)
    record = {"id": len(report.content["images"]) + 1, "file_name": name, "width": width, "height": height}
    report.content["images"].append(record)
    return record


def _tell_unreadable(report: Report, unreadable: Sequence[str]) -> None:
    report.add(
        "image files that cannot be read", unreadable, "replace the files, or take them out", fatal=True
    )


def _add_annotation(report: Report, image: Mapping[str, Any], number: int, box: Sequence[float]) -> None:
    annotations = report.content["annotations"]
    box = [round(value, 3) for value in box]
    record = dict(id=len(annotations) + 1, image_id=image["id"], category_id=number, bbox=box, iscrowd=0)
    annotations.append({**record, "area": round(box[2] * box[3], 3)})
