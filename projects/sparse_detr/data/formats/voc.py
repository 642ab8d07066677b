"""Pascal VOC: an XML file of objects for each image."""

from __future__ import annotations

import functools
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from ..coco import is_number
from ..report import Report
from .builder import IMAGE_ENDINGS, SPLITS, SetBuilder


def voc_classes(source: str | Sequence[str]) -> list[str]:
    """The names in all XML files of both splits, in alphabetical order: VOC files have no list of them."""
    names: set[str] = set()
    for split in SPLITS:
        for path in _voc_files(source, split) or ():
            file = _voc_file(path)
            names.update(name for name, _ in (file.objects if file else ()) if name)
    if not names:
        raise UserError(f"data.voc={source}: there is no object in its XML files")
    return sorted(names)


def has_voc_split(source: str | Sequence[str], split: str) -> bool:
    return _voc_files(source, split) is not None


def read_voc(source: str | Sequence[str], split: str) -> Report:
    """One split of Pascal VOC data, "train" or "val", with the classes of both.

    Pixels are counted from 1 in VOC; a set with a box that begins at 0 counts from 0. An XML file without a
    size has that of its image. Objects that are ``difficult`` are objects.

    Args:
        source: a folder with ``ImageSets/Main``, ``Annotations`` and ``JPEGImages``; one with the folders
            ``train`` and ``valid`` of XML files; one of XML files, which is the training set; or the training
            set and the validation set, each a folder or a list of ``ImageSets/Main``.

    Raises:
        UserError: there are no such files.
    """
    files = _voc_files(source, split)
    if files is None:
        raise UserError(f"data.voc={source} has no {split} set")
    parsed = {path: _voc_file(path) for path in files}
    images = {path: _voc_image(path, file) for path, file in parsed.items()}
    classes = voc_classes(source)
    builder = SetBuilder(f"data.voc={source} ({split})", list(images.values()), classes)
    missing: list[str] = []
    broken: list[str] = []
    incomplete: list[str] = []
    numbers = {name: number for number, name in enumerate(classes)}
    boxes = []
    for path, image in images.items():
        file = parsed[path]
        if file is None:
            (broken if path.is_file() else missing).append(path.name)
            continue
        record = builder.add_image(image, file.size)
        if record is None:
            continue
        for name, corners in file.objects:
            if name is None or corners is None:
                incomplete.append(f"{path.name}: {name or 'an object'}")
            else:
                boxes.append((record, numbers[name], corners))
    first = 1 if all(min(corners[:2]) >= 1 for *_, corners in boxes) else 0
    for record, number, (left, top, right, bottom) in boxes:
        box = [left - first, top - first, right - (left - first), bottom - (top - first)]
        builder.add_box(record, number, box)
    report = builder.report
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
    builder.tell_unreadable()
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
        return next((_voc_set(found[name]) for name in SPLITS[split] if name in found), None)
    for name in SPLITS[split]:
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
    """None if it cannot be read. Parsed once, until it changes: the classes and each split ask for it."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1 << 16)
def _parsed(path: Path, _changed: int, _size: int) -> _VocFile | None:
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
