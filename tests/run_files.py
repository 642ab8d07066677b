"""What a run leaves in its folder."""

import json
from pathlib import Path

import torch


def metrics(folder: Path) -> dict[int, dict]:
    """The numbers of metrics.json by iteration."""
    rows = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["iteration"], {}).update(row)
    return rows


def same(first: object, second: object) -> bool:
    """Bitwise equality of nested checkpoint contents."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def read(path: Path) -> dict:
    """A checkpoint's contents."""
    return torch.load(path, weights_only=True)


def detections(folder: Path) -> list[dict]:
    """What the last evaluation detected."""
    return json.loads((folder / "inference" / "coco_instances_results.json").read_text())
