"""Several COCO files as one set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from ...errors import UserError, listed
from ..coco import in_order, read_annotations
from ..report import Report, is_id, record_id


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
