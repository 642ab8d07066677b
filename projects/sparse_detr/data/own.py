"""Data of one's own: what a config's ``data`` section names, as one COCO-format file for each split."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.utils import comm

from ..errors import UserError
from .check import category_names
from .coco import read_annotations
from .formats import (
    has_voc_split,
    has_yolo_split,
    merge_coco,
    read_voc,
    read_yolo,
    select_classes,
    voc_classes,
    yolo_classes,
)
from .register import coco_dataset
from .report import Report, to_mend

logger = logging.getLogger(__name__)

_JSON_KEYS = ("train_json", "train_images", "val_json", "val_images")
# What this process has converted: the files by the section, the split and the folder.
_converted: dict[tuple[str, str, str], tuple[str, str]] = {}


def own_classes(data: Mapping[str, Any]) -> list[str]:
    """The classes of the training set that ``data`` names, or of the validation set where it names no other.

    Raises:
        UserError: the files cannot be read, or have no classes.
    """
    kind = _kind(data)
    if kind == "yolo":
        return yolo_classes(data["yolo"])
    if kind == "voc":
        return voc_classes(data["voc"])
    split = "train" if data.get("train_json") else "val"
    source = data[f"{split}_json"]
    if isinstance(source, str):
        return category_names(source)
    merged = merge_coco(list(source), _folders(data, split))
    return [category["name"] for category in merged.content["categories"]]


def has_own_split(data: Mapping[str, Any], split: str) -> bool:
    """Whether ``data`` names a set for "train" or "val"."""
    kind = _kind(data)
    if kind == "yolo":
        return has_yolo_split(data["yolo"], split)
    if kind == "voc":
        return has_voc_split(data["voc"], split)
    return data.get(f"{split}_json") is not None


def own_files(
    data: Mapping[str, Any], split: str, folder: str, *, afresh: bool = True
) -> tuple[str, str] | None:
    """A split's JSON file and image folder; None if ``data`` names none.

    One COCO file, all of whose classes are wanted, is taken as it is. Everything else becomes a JSON file in
    ``folder``, written once on each machine: call it in every process.

    Args:
        data: the section of ``configs/common/data/custom.py``.
        split: "train" or "val".
        afresh: also where this process has done so before.

    Raises:
        UserError: the data cannot be read as they must be, or contradict each other.
    """
    if not has_own_split(data, split):
        _check_pair(data, split)
        return None
    plain = _plain(data, split)
    if plain is not None:
        return plain
    section = str(sorted((key, str(value)) for key, value in data.items()))
    key = (section, split, os.path.abspath(folder))
    if afresh or key not in _converted:
        found: tuple[str, str] | UserError | None = None
        if comm.get_local_rank() == 0:
            try:
                found = _written(_read(data, split), os.path.join(folder, f"{split}.json"))
            except UserError as error:
                found = error
        found = comm.all_gather(found)[comm.get_rank() - comm.get_local_rank()]
        if isinstance(found, UserError):
            raise found
        assert found is not None
        _converted[key] = found
    return _converted[key]


def own_dataset(
    *,
    names: str | Sequence[str],
    data: Mapping[str, Any],
    split: str,
    folder: str,
    filter_empty: bool = False,
) -> list[dict]:
    """A config's ``dataloader.*.dataset``: the dataset dicts of what its ``data`` section names.

    Args:
        names, filter_empty: see ``coco_dataset``.
        data, split, folder: see ``own_files``.
    """
    json_file, image_root = own_files(data, split, folder, afresh=False) or ("", "")
    return coco_dataset(names=names, json_file=json_file, image_root=image_root, filter_empty=filter_empty)


def class_list(data: Mapping[str, Any]) -> list[str] | None:
    """The names in ``data.classes``, as they are in the data; None if there are none.

    Raises:
        UserError: it is no list, or has a name twice.
    """
    names = data.get("classes")
    if names is None:
        return None
    if isinstance(names, str):
        raise UserError(f"data.classes={names} is a list: write data.classes=[{names}]")
    decoded = [json.loads(name) if str(name).startswith('"') else str(name) for name in names]
    if len({*decoded}) < len(decoded):
        raise UserError(f"data.classes={decoded} has a name twice")
    return decoded


def _kind(data: Mapping[str, Any]) -> str:
    """Which of its keys a section uses: "yolo", "voc" or "json"."""
    given = [key for key in ("yolo", "voc") if data.get(key)]
    if jsons := [key for key in _JSON_KEYS if data.get(key)]:
        given.append(jsons[0])
    if len(given) > 1:
        told = " and ".join(f"data.{key}={data[key]}" for key in given)
        raise UserError(
            f"{told}: two sources of data; pass one, and null for the other (data.{given[0]}=null)"
        )
    return given[0] if given and given[0] in ("yolo", "voc") else "json"


def _check_pair(data: Mapping[str, Any], split: str) -> None:
    json_file, images = data.get(f"{split}_json"), data.get(f"{split}_images")
    if bool(json_file) != bool(images):
        raise UserError(f"data.{split}_json={json_file} and data.{split}_images={images}: pass both")


def _folders(data: Mapping[str, Any], split: str) -> str | list[str]:
    _check_pair(data, split)
    folders = data[f"{split}_images"]
    return folders if isinstance(folders, str) else list(folders)


def _plain(data: Mapping[str, Any], split: str) -> tuple[str, str] | None:
    """One COCO file whose classes are all wanted; or one that cannot be read, for the check to tell."""
    if _kind(data) != "json":
        return None
    _check_pair(data, split)
    json_file, images = data[f"{split}_json"], data[f"{split}_images"]
    if not isinstance(json_file, str):
        return None
    if (classes := class_list(data)) is None:
        return json_file, images
    try:
        names = category_names(json_file)
    except UserError:
        return json_file, images
    return None if len({*names}) > len(classes) else (json_file, images)


def _read(data: Mapping[str, Any], split: str) -> Report:
    kind, classes = _kind(data), class_list(data)
    if kind == "yolo":
        report = read_yolo(data["yolo"], split)
    elif kind == "voc":
        report = read_voc(data["voc"], split)
    elif isinstance(file := data[f"{split}_json"], str):
        report = Report(str(file), str(data[f"{split}_images"]), read_annotations(file))
    else:
        report = merge_coco(list(file), _folders(data, split))
    if classes is not None and classes != [c.get("name") for c in report.content["categories"]]:
        select_classes(report, classes)
    return report


def _written(report: Report, path: str) -> tuple[str, str]:
    """Writes a set that is sound as JSON, at once or not at all; its remarks go to the log."""
    if report.errors:
        raise UserError(to_mend(report.errors))
    for remark in report.remarks:
        logger.warning(remark)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = f"{path}.{os.getpid()}.tmp"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"info": {"description": f"made from {report.json_file}"}, **report.content}, file)
    os.replace(partial, path)
    logger.info("%s: read, and written in COCO format as %s", report.json_file, path)
    return path, report.image_root
