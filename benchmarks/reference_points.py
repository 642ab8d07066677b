#!/usr/bin/env python
"""Where tokens say they are, beside where they are: the numbers of docs/reference_points.md.

    python benchmarks/reference_points.py                           tables, published and exact sizes
    python benchmarks/reference_points.py --picture points.png      one row of cells, level by level
    python benchmarks/reference_points.py --receptive-field         which pixels a cell sees
    python benchmarks/reference_points.py --places output/my_run    AP with one place at a time the other way

A token's reference point on a level is turned into pixels of the image and compared with the centre of
its cell, ``(j + .5) * stride``. A box's centre on a level is what the decoder looks around for a query at
the image's far edge. All of it is read off a real model's tokens: two-stage Deformable DETR, R50, four
levels of strides 8 to 64.
"""

import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import _checkout
import torch
from tabulate import tabulate

from sparse_detr import build_model, load_config
from sparse_detr.engine import Evaluation
from sparse_detr.modeling import DetectionTransformer, SetDetector, Tokens
from sparse_detr.modeling.tokens import exact_extents

CONFIG = "deformable_detr/deformable_detr_r50_two_stage_50ep"
SMALL = (
    "model.transformer.embed_dim=64",
    "model.transformer.encoder.num_layers=1",
    "model.transformer.decoder.num_layers=1",
)
# An image's width, and the width that its batch is padded to
WIDTHS = ((64, 64), (150, 150), (150, 171), (150, 200), (256, 256), (333, 400), (500, 640), (1066, 1066),
          (1066, 1333), (1333, 1333))  # fmt: skip


@torch.no_grad()
def tokens_of(model: SetDetector, width: int, padded: int, height: int = 128) -> Tokens:
    """The tokens of an image (height, width) in a batch that is ``padded`` pixels wide."""
    channels = [model.backbone.output_shape()[name].channels for name in model.in_features]
    features = [torch.zeros(1, c, -(-height // s), -(-padded // s)) for c, s in zip(channels, model.strides)]
    return model.decode(features, [(height, width)], (height, padded)).tokens


def row_of(tokens: Tokens, level: int) -> slice:
    """The first row of a level's cells, those that show the image."""
    start = tokens.level_starts[level]
    return slice(start, start + int(tokens.valid_cells[0, level, 0]))


def placed(tokens: Tokens, strides: list[int], level: int, on: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) pixels at which the tokens of a row of ``level`` look on level ``on``, and their centres'."""
    x = tokens.reference_points[0, row_of(tokens, level), on, 0]
    centres = (torch.arange(len(x)) + 0.5) * strides[level]
    return x * tokens.shapes[on][1] * strides[on], centres


def errors(model: SetDetector, width: int, padded: int) -> dict[str, list[float]]:
    """Pixels, the largest of each level's row of cells.

    own: a token's reference point on its own level; other: on the level where it is furthest off.
    proposal: the proposal's centre in the image; position: the position code's.
    query: where the decoder looks for a box at the far edge.
    """
    tokens, strides = tokens_of(model, width, padded), model.strides
    levels = range(len(strides))
    found: dict[str, list[float]] = {"own": [], "other": [], "proposal": [], "query": []}
    for level in levels:
        off = []
        for on in levels:
            at, centres = placed(tokens, strides, level, on)
            off.append(float((at - centres).abs().max()))
        found["own"].append(off[level])
        found["other"].append(max(off))
        centre = tokens.centres[0, row_of(tokens, level), 0] * width
        _, centres = placed(tokens, strides, level, level)
        found["proposal"].append(float((centre - centres).abs().max()))
        edge = float(tokens.valid_ratios[0, level, 0]) * tokens.shapes[level][1] * strides[level]
        found["query"].append(abs(edge - width))
    return found


def tables(models: dict[str, SetDetector]) -> str:
    head = ["width", "batch", *(f"stride {stride}" for stride in next(iter(models.values())).strides)]
    titles = {
        "own": "A token's reference point on its own level, furthest from its cell's centre, pixels",
        "other": "The same on the level where it is furthest off (what an encoder layer reads there)",
        "proposal": "A proposal's centre in the image, and the position code's",
        "query": "Where the decoder looks for a query at the far edge",
    }
    text = []
    for quantity, title in titles.items():
        rows = []
        for width, padded in WIDTHS:
            cells = [errors(model, width, padded)[quantity] for model in models.values()]
            rows.append([width, padded, *(" / ".join(f"{e:.1f}" for e in level) for level in zip(*cells))])
        text.append(f"{title} ({' / '.join(models)}):\n\n{tabulate(rows, head, 'github')}")
    return "\n\n".join(text)


def draw(models: dict[str, SetDetector], path: str, width: int = 150) -> None:
    """One row of cells per level: true centres, and where tokens think they are, alone and in batches."""
    from matplotlib import pyplot

    strides = next(iter(models.values())).strides
    batches = (width, 171, 200)
    figure, axes = pyplot.subplots(len(models), len(batches), figsize=(13, 5), sharex=True, sharey=True)
    for row, (name, model) in zip(axes, models.items()):
        for axis, padded in zip(row, batches):
            tokens = tokens_of(model, width, padded)
            for level in range(len(strides)):
                centres = placed(tokens, strides, level, level)[1]
                said = tokens.centres[0, row_of(tokens, level), 0] * width
                axis.plot(centres, [level] * len(centres), "k|", markersize=16, label="cell centre")
                axis.plot(said, [level] * len(said), "ro", markersize=4, label="reference point")
                for x, y in zip(centres.tolist(), said.tolist()):
                    axis.plot([x, y], [level, level], "r-", linewidth=1)
            axis.axvspan(width, 200, color="0.9")
            axis.set_title(
                f"{name}: {width} pixels, " + ("alone" if padded == width else f"padded to {padded}")
            )
            axis.set_yticks(range(len(strides)), [f"stride {stride}" for stride in strides])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="lower center", ncols=2)
    for axis in axes[-1]:
        axis.set_xlabel("x, pixels (grey: outside the image)")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


def receptive_field(size: int = 384, mixes: int = 3, draws: int = 2) -> str:
    """Centre of mass of the pixels that one cell in the middle of each map depends on.

    Convolutions with stride 2 and padding 1 put cell j around pixel j * stride; ``(j + .5) * stride`` is
    the centre of the square that it stands for.
    """
    model = build_model(CONFIG, overrides=SMALL)
    total: list[list[float]] = [[] for _ in model.strides]
    for seed in range(draws):
        torch.manual_seed(seed)
        image = torch.randn(1, 3, size, size, requires_grad=True)
        maps = model.backbone(image)
        maps = model.neck([maps[name] for name in model.in_features])
        for level, x in enumerate(maps):
            j = x.shape[-1] // 2
            signs = torch.randn(mixes, x.shape[1]).sign()
            mass = torch.zeros(size)
            for sign in signs:
                (grad,) = torch.autograd.grad((x[0, :, j, j] * sign).sum(), image, retain_graph=True)
                mass += grad[0].abs().sum((0, 1))
            at = float((mass * (torch.arange(size) + 0.5)).sum() / mass.sum())
            total[level].append(at - j * model.strides[level])
    rows = [
        [stride, f"{sum(offsets) / draws:.1f}", 0.5, stride / 2]
        for stride, offsets in zip(model.strides, total)
    ]
    return tabulate(rows, ["stride", "measured", "j * stride + .5", "(j + .5) * stride"], "github")


# What of the tokens each place reads
PLACES = {
    "encoder references": ("reference_points",),
    "proposals": ("centres", "proposals", "unproposed"),
    "decoder's scaling": ("valid_ratios",),
    "position codes": ("position",),
}


def places(folder: str) -> str:
    """AP of a run's weights with all sizes as trained, with one place the other way, and with all."""
    cfg = load_config(folder)
    exact = cfg.model.exact_sizes
    evaluation = Evaluation(cfg)
    transform, tokenize = SetDetector._transform, DetectionTransformer.tokenize
    rows = []
    for name, changed in {"none": (), **PLACES, "all four": sum(PLACES.values(), ())}.items():
        other: list[Tokens] = []

        def with_both(self, maps, masks, sizes, padded, targets, other=other):
            has_padding = any(size != padded for size in sizes)
            self.exact_sizes = not exact
            extents = None if exact else exact_extents(sizes, self.strides, self.pixel_mean)
            other_masks = self._masks(maps, sizes, padded)
            self.exact_sizes = exact
            other[:] = [tokenize(self.transformer, maps, other_masks, has_padding, extents)]
            return transform(self, maps, masks, sizes, padded, targets)

        def mixed(self, *args, changed=changed, other=other):
            tokens = tokenize(self, *args)
            for attribute in changed:
                setattr(tokens, attribute, getattr(other[0], attribute))
            return tokens

        model = build_model(cfg, os.path.join(folder, "model_final.pth"))
        with (
            mock.patch.object(SetDetector, "_transform", with_both),
            mock.patch.object(DetectionTransformer, "tokenize", mixed),
        ):
            found = evaluation(model)["bbox"]
        rows.append([name, *(found[key] for key in ("AP", "AP50", "AP75"))])
    here, there = ("exact", "as published") if exact else ("as published", "exact")
    head = [f"{there} in inference (trained {here})", "AP", "AP50", "AP75"]
    return tabulate(rows, head, "github", ".1f")


def main() -> None:
    parser = _checkout.parser(__doc__)
    parser.add_argument("--picture", metavar="FILE", help="draw one row of cells instead")
    parser.add_argument("--receptive-field", action="store_true", help="measure where cells look instead")
    parser.add_argument("--places", metavar="RUN", help="evaluate a run's weights with mixed sizes instead")
    args = parser.parse_args()
    if args.places:
        print(places(args.places))
        return
    if args.receptive_field:
        print("Pixels from j * stride to the centre of what cell j sees (random weights):\n")
        print(receptive_field())
        return
    models = {
        name: build_model(CONFIG, overrides=[*SMALL, f"model.exact_sizes={exact}"])
        for name, exact in (("published", False), ("exact", True))
    }
    if args.picture:
        draw(models, args.picture)
        print(args.picture)
    else:
        print(tables(models))


if __name__ == "__main__":
    _checkout.run(main)
