"""Figures of the page, as PNG; boxes on images, as JPEG."""

import io
from collections.abc import Sequence

import numpy as np
from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..data.image import read_image
from ..visualize import side_by_side
from .detections import Box, Detections, ImageErrors
from .run import Run

COLOURS = color_sequences["tab10"]
STATES = {"right": "limegreen", "wrong class": "orange", "missed": "red", "false": "red"}
MOST_CURVES = 10  # classes with a curve of their own
MOST_LABELS = 40  # classes up to which a confusion matrix shows names and counts


def curves(runs: Sequence[Run], keys: Sequence[str], *, columns: int = 3) -> bytes:
    """One panel per number of metrics.json, one line per run, over iterations."""
    rows = -(-len(keys) // columns)
    figure = Figure((4.2 * min(columns, len(keys)), 2.6 * rows), layout="constrained")
    for place, key in enumerate(keys, 1):
        axes = figure.add_subplot(rows, min(columns, len(keys)), place)
        for number, run in enumerate(runs):
            # a few values, such as those of evaluations, are seen as points
            marker = "o" if len(run.curve(key)[0]) < 20 else ""
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(*run.curve(key), marker=marker, ms=4, lw=1.4, color=colour, label=run.name)
        axes.set_title(key, fontsize=10)
        axes.set_xlim(left=0)
        if key.startswith("bbox/"):
            axes.set_ylim(bottom=0)
        _plain(axes, "iteration")
    if len(runs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9)
    return _png(figure)


def precision_recall(found: Detections) -> bytes:
    """At IoU 0.5: the mean, and each class, or the best and the worst of many."""
    figure = Figure((7.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    known = np.flatnonzero(found.objects)
    shown = known[np.argsort(-found.numbers["AP50"][known], kind="stable")]
    if len(shown) > MOST_CURVES:
        shown = np.concatenate([shown[: MOST_CURVES // 2], shown[-MOST_CURVES // 2 :]])
    for number, k in enumerate(shown):
        label = f"{found.classes[k]} ({found.numbers['AP50'][k]:.1f})"
        axes.plot(found.recall, found.precision[:, k], lw=1.2, color=COLOURS[number], label=label)
    if len(known) > 1:
        mean = f"mean of {len(known)} classes ({found.mean('AP50'):.1f})"
        axes.plot(found.recall, found.precision[:, known].mean(1), lw=2.6, color="black", label=mean)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="precision")
    _plain(axes, "recall")
    if len(known):
        figure.legend(loc="outside right upper", fontsize=9, title="AP50", title_fontsize=9)
    return _png(figure)


def confusion(found: Detections) -> bytes:
    """Rows are the true classes and add up to 100 %; the last row is in counts of false detections."""
    names, counts = [*found.classes, "nothing"], found.confusion
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(3.0, min(0.55 * len(names), 14))
    figure = Figure((side + 1.0, side + 0.8), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="detected", ylabel="true")
    if len(names) <= MOST_LABELS:
        axes.set_xticks(range(len(names)), [*found.classes, "missed"], rotation=45, ha="right", fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                dark = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, count, ha="center", va="center", fontsize=8, color=dark)
    return _png(figure)


def errors(image: ImageErrors, metadata: Metadata, *, side: int = 420) -> bytes:
    """Ground truth | detections, coloured by what became of them; ``side``: the longer one, in pixels."""
    pixels = read_image(image.file_name, "RGB")
    scale = side / max(pixels.shape[:2])
    pictures = [_boxes(pixels, boxes, metadata, scale) for boxes in (image.truth, image.found)]
    buffer = io.BytesIO()
    Image.fromarray(side_by_side(pictures)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _boxes(pixels: np.ndarray, boxes: Sequence[Box], metadata: Metadata, scale: float) -> np.ndarray:
    labels = [box.name + (f" {box.score:.0%}" if box.score is not None else "") for box in boxes]
    return (
        Visualizer(pixels, metadata, scale)
        .overlay_instances(
            boxes=np.array([box.xyxy for box in boxes]).reshape(-1, 4),
            labels=labels,
            assigned_colors=[STATES[box.state] for box in boxes],
        )
        .get_image()
    )


def _plain(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
