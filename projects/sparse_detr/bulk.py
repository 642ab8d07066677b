"""Detection in many images: files in, records out, in batches of like sizes.

The command is ``cli/predict_many.py``; what it writes, ``results.py``.
"""

import glob
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.data import DatasetFromList
from detectron2.structures import Instances
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .data.image import EXTENSIONS, read_image
from .errors import UserError
from .predictor import Predictor, Preparation
from .results import BOX_FORMATS, arrow_schema

WAITING = 8  # batches whose images wait for others of their size


class BulkDetector:
    """Files in, records out.

    Args:
        predict: the predictor; its threshold counts.
        batch_size: most images in a batch.
        num_workers: processes that read and resize; 0 reads in this one.
        max_padding: largest share of a batch that may be padding; 0 puts images of equal size together,
            whose results are those of each alone. None is 0.1 for models with ``exact_sizes`` and
            ``pad_features``, whose results do not depend on padding (docs/reference_points.md), else 0.
        box_format: "xyxy" or "xywh", in pixels of the file's image.
    """

    def __init__(
        self,
        predict: Predictor,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        max_padding: float | None = None,
        box_format: str = "xyxy",
    ) -> None:
        if max_padding is None:
            max_padding = 0.1 if predict.model.exact_sizes and predict.model.pad_features else 0.0
        if batch_size < 1 or num_workers < 0 or not 0 <= max_padding < 1:
            raise UserError(
                f"batch size {batch_size}, {num_workers} workers, padding {max_padding}: expected at least "
                "1, at least 0, and a share in [0, 1)"
            )
        if box_format not in BOX_FORMATS:
            raise UserError(f"box format {box_format}: expected {' or '.join(BOX_FORMATS)}")
        self.predict = predict
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_padding = max_padding
        self.box_format = box_format

    def __call__(self, file_names: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Records of the files, some at a time, in the order in which they are done: ``file_name`` and
        either what docs/predict.md lists or ``error``."""
        if not file_names:
            return
        loader = DataLoader(
            _Files(file_names, self.predict.prepare),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            prefetch_factor=self.batch_size if self.num_workers else None,
        )
        for batch in in_batches(loader, self.batch_size, self.max_padding):
            yield [batch[0]] if "error" in batch[0] else self._detect(batch)

    def _detect(self, batch: list[dict]) -> list[dict[str, Any]]:
        entries = [{**entry, "image": torch.from_numpy(entry["image"])} for entry in batch]
        try:
            found = self.predict.detect(entries)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                return [{"file_name": batch[0]["file_name"], "error": str(error).partition("\n")[0]}]
        else:
            return [self._record(e, f["instances"].to("cpu")) for e, f in zip(batch, found)]
        middle = len(batch) // 2  # here, where the exception no longer holds the tensors
        return self._detect(batch[:middle]) + self._detect(batch[middle:])

    def _record(self, entry: dict, instances: Instances) -> dict[str, Any]:
        boxes = instances.pred_boxes.tensor.double()
        if self.box_format == "xywh":
            boxes[:, 2:] -= boxes[:, :2]
        classes = instances.pred_classes.tolist()
        return {
            "file_name": entry["file_name"],
            "width": entry["width"],
            "height": entry["height"],
            "boxes": [[round(x, 2) for x in box] for box in boxes.tolist()],
            "scores": [round(x, 5) for x in instances.scores.tolist()],
            "category_ids": [self.predict.category_ids[c] for c in classes],
            "class_names": [self.predict.class_names[c] for c in classes],
        }


class RayDetector:
    """A callable class for Ray Data's ``map_batches``, see docs/predict.md: a table with a column
    ``file_name`` becomes one with the fields of a record and ``error``, null where there is none.

    Args:
        config, weights, **kwargs: of the ``Predictor``, which each actor builds for itself.
        options: arguments of ``BulkDetector``.
    """

    def __init__(
        self, config: str, weights: str = "", options: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.detect = BulkDetector(Predictor(config, weights, **kwargs), **(options or {}))

    def __call__(self, table: Any) -> Any:
        """``pyarrow.Table`` to ``pyarrow.Table``; the rows may change their order."""
        import pyarrow

        records = [r for batch in self.detect(table["file_name"].to_pylist()) for r in batch]
        schema = arrow_schema().append(pyarrow.field("error", pyarrow.string()))
        return pyarrow.Table.from_pylist(records, schema)


class _Files(Dataset):
    """Reads and prepares images; one that cannot be read becomes an entry with an ``error``."""

    def __init__(self, names: Sequence[str], prepare: Preparation) -> None:
        # One array for all workers: a million strings would be copied as they are looked at.
        self.names = DatasetFromList(list(names), copy=False)
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        try:
            entry = self.prepare(read_image(name, Predictor.input_format))
        except Exception as error:  # whatever it is, it is this file's
            return {"file_name": name, "error": getattr(error, "problem", None) or repr(error)}
        # numpy: a tensor would take a file descriptor and shared memory, of which containers have little
        return {**entry, "image": entry["image"].numpy(), "file_name": name}


def _as_it_is(entry: Any) -> Any:
    return entry


def in_batches(entries: Iterable[dict], size: int, max_padding: float) -> Iterator[list[dict]]:
    """Entries whose ``image`` (3, h, w) are alike, ``size`` or fewer at a time; one with an ``error`` at once
    and alone.

    Some batches' worth of images wait; the one that has waited longest goes with those that are most like it.
    """
    waiting: list[dict] = []
    for entry in entries:
        if "error" in entry:
            yield [entry]
            continue
        waiting.append(entry)
        if len(waiting) >= WAITING * size:
            yield _take_batch(waiting, size, max_padding)
    while waiting:
        yield _take_batch(waiting, size, max_padding)


def _take_batch(waiting: list[dict], size: int, max_padding: float) -> list[dict]:
    height, width = waiting[0]["image"].shape[1:]

    def distance(index: int) -> int:
        _, h, w = waiting[index]["image"].shape
        return abs(h - height) + abs(w - width)

    chosen: list[int] = []
    for index in sorted(range(len(waiting)), key=distance):  # the first comes first
        sizes = [waiting[i]["image"].shape[1:] for i in (*chosen, index)]
        if _padding(sizes) <= max_padding:
            chosen.append(index)
        if len(chosen) == size:
            break
    return [waiting.pop(index) for index in sorted(chosen, reverse=True)][::-1]


def _padding(sizes: Sequence[tuple[int, int]]) -> float:
    """The share of a batch that is padding."""
    heights, widths = zip(*sizes)
    return 1 - sum(h * w for h, w in sizes) / (len(sizes) * max(heights) * max(widths))


def find_files(inputs: Sequence[str]) -> list[str]:
    """The image files among files, folders (with all that is below), globs, and lists of paths (.txt, one
    per line), in order, each once. What a list names is not looked up.

    Raises:
        UserError: one of ``inputs`` holds none.
    """
    paths: dict[str, None] = {}
    for entry in inputs:
        if os.path.isdir(entry):
            found = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(entry)
                for name in names
                if os.path.splitext(name)[1].lower() in EXTENSIONS
            ]
            found.sort()
        elif entry.endswith(".txt") and os.path.isfile(entry):
            with open(entry, encoding="utf-8", errors="surrogateescape") as file:
                found = [line.strip() for line in file if line.strip()]
        elif os.path.isfile(entry):
            found = [entry]
        else:
            found = sorted(p for p in glob.iglob(entry, recursive=True) if os.path.isfile(p))
        if not found:
            raise UserError(
                f"--input {entry}: no such file or glob, or no image in that folder "
                f"({' '.join(sorted(EXTENSIONS))}) or list"
            )
        paths.update(dict.fromkeys(map(os.path.normpath, found)))
    return list(paths)


def in_share(file_name: str, process: int, processes: int) -> bool:
    """Whether a file is the process's, by a hash of its name: processes need not agree on anything, not even
    on which files a folder holds while others are still being added."""
    return zlib.crc32(os.fsencode(file_name)) % processes == process


def weights_digest(model: nn.Module) -> str:
    """The same for the same weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
