"""The page itself: one HTML file with everything in it."""

import base64
import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from ..errors import UserError
from . import figures
from .detections import MATCHING_IOU, Detections, read_detections
from .run import Run, loss_keys, read_runs

TOTALS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
OTHER_CURVES = ("lr", "grad_norm", "time")


def write_page(
    folders: Iterable[str],
    output: str | Path,
    *,
    threshold: float = 0.4,
    num_images: int = 12,
    overrides: Iterable[str] = (),
    pictures: str | Path | None = None,
) -> list[str]:
    """Writes a page on the runs in ``folders``; several are compared.

    Args:
        output: the HTML file. It needs no other file.
        threshold: lowest score of a detection in confusion matrices and images.
        num_images: how many images to show of each run, those with the most errors.
        overrides: of the runs' configs, such as ``data.root=...`` where data have moved.
        pictures: folder for the page's pictures as files of their own.

    Returns:
        What could not be shown, and why: "my_run: not evaluated yet".

    Raises:
        UserError: a folder holds no run.
    """
    runs = read_runs(folders, overrides)
    images: dict[str, bytes] = {}
    evaluated = _curves(runs, images)
    sections: list[dict] = []
    missing = []
    for run in runs:
        section: dict = {"run": run, "number": len(sections)}
        try:
            found = read_detections(run, threshold)
        except (UserError, OSError) as error:
            section["problem"] = str(error)
            missing.append(f"{run.name}: {error}")
        else:
            section |= _section(found, f"{len(sections)}_", images, num_images)
        sections.append(section)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value, digits=1: (
        "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"
    )
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    page = template.render(
        runs=runs,
        sections=sections,
        totals=TOTALS,
        evaluated=evaluated,
        threshold=threshold,
        iou=MATCHING_IOU,
        images={name: _embedded(name, data) for name, data in images.items()},
    )
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(page, encoding="utf-8")
    if pictures is not None:
        Path(pictures).mkdir(parents=True, exist_ok=True)
        for name, data in images.items():
            (Path(pictures) / name).write_bytes(data)
    return missing


def _curves(runs: list[Run], images: dict[str, bytes]) -> bool:
    """Adds the figures of what was noted by iteration; whether an evaluation was."""
    keys = set().union(*(run.keys for run in runs))
    metrics = [key for key in (f"bbox/{total}" for total in TOTALS[:6]) if key in keys]
    for name, chosen in (
        ("losses.png", loss_keys(runs)),
        ("ap.png", metrics),
        ("other.png", [key for key in OTHER_CURVES if key in keys]),
    ):
        if chosen:
            images[name] = figures.curves(runs, chosen)
    return bool(metrics)


def _section(found: Detections, prefix: str, images: dict[str, bytes], num_images: int) -> dict:
    """What the page shows of one run's detections; its pictures are added to ``images``."""
    images[f"{prefix}precision_recall.png"] = figures.precision_recall(found)
    images[f"{prefix}confusion.png"] = figures.confusion(found)
    worst = [image for image in found.images[: max(num_images, 0)] if image.severity[0]]
    shown = []
    for place, image in enumerate(worst):
        name = f"{prefix}errors_{place:02d}.jpg"
        images[name] = figures.errors(image, found.metadata)
        shown.append((name, Path(image.file_name).name, str(image)))
    return {
        "found": found,
        "means": {column: found.mean(column) for column in TOTALS},
        "precision_recall": f"{prefix}precision_recall.png",
        "confusion": f"{prefix}confusion.png",
        "worst": shown,
        "wrong": sum(bool(image.severity[0]) for image in found.images),
    }


def _embedded(name: str, data: bytes) -> str:
    kind = "jpeg" if name.endswith(".jpg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
