"""Detections of many images as a folder of JSON lines, written as they come, which survives a kill.

The folder holds ``settings.json``, what all its lines were made with, and for each process that has worked on
it ``part-00000.jsonl``, one line per image, and ``errors-00000.jsonl``, one line per file without a result.
A line counts once it ends: what a killed process left of its last one is cut off at the next start.
docs/predict.md has the fields.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

BOX_FORMATS = ("xyxy", "xywh")
_ABOUT = ("model",)  # settings that say where from, and may change: a run's folder can be moved


class ResultsWriter:
    """Where one process of several writes.

    Args:
        folder: the results folder, made if it does not exist.
        settings: what the lines are made with; must be JSON.
        process, processes: this one's number, from 0, and how many there are now. At an earlier start
            there may have been more or fewer.

    Raises:
        UserError: the folder's lines were made with other settings, or another process writes its part.
    """

    def __init__(
        self, folder: str | os.PathLike, settings: Mapping[str, Any], process: int = 0, processes: int = 1
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._agree(dict(settings))
        self._files: dict[str, BinaryIO] = {}
        for kind in ("part", "errors"):
            for path in sorted({*self.folder.glob(f"{kind}-*.jsonl"), self._path(kind, process)}):
                number = int(path.stem.rpartition("-")[2])
                if number % processes == process:  # also of processes that are no more
                    file = _open(path)
                    if number == process:
                        self._files[kind] = file
                    else:
                        file.close()

    def _path(self, kind: str, process: int) -> Path:
        return self.folder / f"{kind}-{process:05d}.jsonl"

    def _agree(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        if not path.exists():  # all processes write the same
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            os.replace(new, path)
        before = read_settings(self.folder)
        settings = json.loads(json.dumps(settings))  # as it was read
        other = [k for k in settings | before if k not in _ABOUT and settings.get(k) != before.get(k)]
        if other:
            values = ", ".join(f"{k} {_short(before.get(k))}, now {_short(settings.get(k))}" for k in other)
            raise UserError(
                f"{self.folder} holds results that were made with other settings ({values}): pass these, or "
                "another --output"
            )

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds a line for each image; those with an ``error`` go to the errors file. They are with the
        operating system, whatever happens to this process, when it returns."""
        lines: dict[str, list[str]] = {kind: [] for kind in self._files}
        for record in records:
            lines["errors" if "error" in record else "part"].append(json.dumps(record) + "\n")
        for kind, file in self._files.items():
            file.write("".join(lines[kind]).encode())
            file.flush()

    def done(self) -> set[str]:
        """File names that have a line, of any process, of this start or an earlier one."""
        return {r["file_name"] for kind in ("part", "errors") for r in _records(self.folder, kind)}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def read_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """What the folder's lines were made with.

    Raises:
        UserError: it is no results folder.
    """
    path = Path(folder) / "settings.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no folder of results: {path.name}: {error}") from None


def read_results(folder: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The images' records, one by one, of all parts; see docs/predict.md."""
    read_settings(folder)
    return _records(Path(folder), "part")


def read_errors(folder: str | os.PathLike) -> Iterator[dict[str, str]]:
    """``file_name`` and ``error`` of the files without a result."""
    read_settings(folder)
    return _records(Path(folder), "errors")


def write_coco(
    folder: str | os.PathLike, target: str | os.PathLike, annotations: str | os.PathLike | None = None
) -> None:
    """Writes the results as the sections of a COCO annotation file, with a ``score`` in each annotation.

    Args:
        folder: a results folder.
        target: the JSON file; its "annotations" are what ``COCO.loadRes`` reads.
        annotations: the ground truth's JSON, whose images, found by the end of their file name, give the
            ids; without it they count from 1.

    Raises:
        UserError: an image is not in ``annotations``.
    """
    settings = read_settings(folder)
    known = None
    if annotations is not None:
        images = json.loads(Path(annotations).read_text(encoding="utf-8"))["images"]
        known = {image["file_name"]: image["id"] for image in images}
    # Two passes: the lines of a million images do not fit into every memory.
    names = zip(settings["category_ids"], settings["class_names"])
    categories = [{"id": index, "name": name} for index, name in names]
    with open(target, "w", encoding="utf-8") as file:
        file.write(f'{{"categories": {json.dumps(categories)},\n"images": [')
        _write_list(file, _coco_images(folder, known))
        file.write('],\n"annotations": [')
        _write_list(file, _coco_annotations(folder, known, settings["box_format"]))
        file.write("]}\n")


def write_parquet(folder: str | os.PathLike, target: str | os.PathLike, rows: int = 10000) -> None:
    """Writes the results as a Parquet file, one row per image, in groups of ``rows``; needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install pyarrow") from None
    read_settings(folder)
    schema = arrow_schema()
    with pyarrow.parquet.ParquetWriter(target, schema) as writer:
        waiting: list[dict[str, Any]] = []
        for record in read_results(folder):
            waiting.append(record)
            if len(waiting) == rows:
                writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
                waiting.clear()
        writer.write_table(pyarrow.Table.from_pylist(waiting, schema))


def arrow_schema() -> Any:
    """The fields of a record as a ``pyarrow.Schema``; needs pyarrow."""
    import pyarrow as pa

    return pa.schema(
        {
            "file_name": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "boxes": pa.list_(pa.list_(pa.float32(), 4)),
            "scores": pa.list_(pa.float32()),
            "category_ids": pa.list_(pa.int32()),
            "class_names": pa.list_(pa.string()),
        }
    )


def _open(path: Path) -> BinaryIO:
    """For appending, this process alone, without the beginning of a line at its end."""
    file = open(path, "ab+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
    except OSError:
        file.close()
        raise UserError(f"another process is writing {path}: wait for it, or take another --output") from None
    end = file.tell()
    while end:  # from the end, in blocks
        start = max(end - 65536, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        end = start + newline + 1
        if newline >= 0:
            break
    file.truncate(end)
    return file


def _records(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(f"{kind}-*.jsonl")):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    yield json.loads(line)
                except ValueError:
                    raise UserError(
                        f"{path}, line {number}, is no JSON: remove the line and start again, which does "
                        "its image again"
                    ) from None


def _coco_images(folder: str | os.PathLike, known: Mapping[str, int] | None) -> Iterator[dict[str, Any]]:
    for index, record in enumerate(read_results(folder), 1):
        name, width, height = record["file_name"], record["width"], record["height"]
        yield {"id": _image_id(index, name, known), "file_name": name, "width": width, "height": height}


def _coco_annotations(
    folder: str | os.PathLike, known: Mapping[str, int] | None, box_format: str
) -> Iterator[dict[str, Any]]:
    count = 0
    for index, record in enumerate(read_results(folder), 1):
        image_id = _image_id(index, record["file_name"], known)
        for box, score, category in zip(record["boxes"], record["scores"], record["category_ids"]):
            x, y, width, height = box
            if box_format == "xyxy":
                width, height = round(width - x, 2), round(height - y, 2)
            count += 1
            yield {
                "id": count,
                "image_id": image_id,
                "category_id": category,
                "bbox": [x, y, width, height],
                "area": width * height,
                "score": score,
                "iscrowd": 0,
            }


def _image_id(index: int, file_name: str, known: Mapping[str, int] | None) -> int:
    if known is None:
        return index
    parts = Path(file_name).parts
    for start in range(len(parts)):  # the longest end first
        if (name := "/".join(parts[start:])) in known:
            return known[name]
    raise UserError(f"{file_name} is no image of the annotation file, whatever folder it is relative to")


def _write_list(file: Any, items: Iterable[Mapping[str, Any]]) -> None:
    for index, item in enumerate(items):
        file.write(",\n" * bool(index) + json.dumps(item))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
