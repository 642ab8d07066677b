"""What accuracy costs: AP, multiply-adds, milliseconds and kept tokens at several token budgets.

    sparse-detr tradeoff --run output/my_run
    sparse-detr tradeoff --run output/my_run --json tradeoff.json --output tradeoff.png
    sparse-detr tradeoff --run output/my_run output/other_run --keep-ratio 0.1 0.3 1 --images 200
    sparse-detr tradeoff --run output/my_run --adaptive

The last checkpoint of each run on its own validation set, one image at a time. All points are measured in
one process and take turns: every image goes through all of them, in a new order, before the next image
does. A model without a keep ratio is one point. `--adaptive` adds a point per keep ratio for which each image
has a token budget of its own (docs/elastic.md); the rule is in the JSON.
"""

import argparse
import contextlib
import io
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from tabulate import tabulate
from tqdm import tqdm

from ..analysis import analyze
from ..calibrate import token_rankings
from ..devices import clock, mixed_precision
from ..engine.checks import has_test_set
from ..errors import UserError
from ..keep_ratio import keep_ratio_range
from ..modeling import MeanRatio
from ..predictor import Predictor
from . import flags

RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # those of them that a run was trained for


class Run:
    """A trained model and its validation images, one per batch."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        overrides = ["dataloader.test.batch_size=1", "dataloader.evaluator.output_dir=null", *args.opts]
        self.name = folder
        self.predict = Predictor(folder, overrides=overrides, device=args.device, dtype=args.dtype)
        self.cfg, self.limit = self.predict.cfg, args.images
        if not has_test_set(self.cfg):
            raise UserError(
                f"{folder} has no validation set: pass --opts data.val_json=... data.val_images=..."
            )
        self.loader = instantiate(self.cfg.dataloader.test)
        self.sizes: list[tuple[int, int]] = []  # of the network's input

    def batches(self) -> Iterator[list[dict]]:
        return itertools.islice(iter(self.loader), self.limit)

    def __len__(self) -> int:
        return min(len(self.loader), self.limit or len(self.loader))

    @property
    def size(self) -> tuple[int, int]:
        """The height and width of the image with the median number of pixels."""
        return sorted(self.sizes, key=lambda size: size[0] * size[1])[len(self.sizes) // 2]


class Point:
    """A run at one token budget: None where the model has none."""

    def __init__(self, run: Run, budget: float | None) -> None:
        self.run, self.budget = run, budget
        self.evaluator = instantiate(run.cfg.dataloader.evaluator)
        self.evaluator.reset()
        self.milliseconds: list[float] = []
        self.images: list = []
        self.kept, self.tokens = 0, 0
        self.encoded = None

    @torch.no_grad()
    def take(self, batch: list[dict]) -> None:
        """Detects in a batch, and notes what it took."""
        predict = self.run.predict
        if self.budget is not None:
            predict.keep_ratio = self.budget
        hook = predict.model.transformer.encoder.register_forward_hook(self._note)
        with mixed_precision(predict.model.device, predict.dtype):
            if not self.milliseconds:
                predict.model(batch)  # builds, compiles, asks for memory
            start = clock(predict.model.device)
            outputs = predict.model(batch)
            self.milliseconds.append(1e3 * (clock(predict.model.device) - start) / len(batch))
        hook.remove()
        self.evaluator.process(batch, outputs)
        self.images += [entry["image_id"] for entry in batch]
        assert self.encoded is not None  # of the hook
        if self.encoded.kept is not None:
            self.kept += int(self.encoded.kept.budgets.sum())
            self.tokens += int((~self.encoded.kept.tokens.mask).sum())

    def _note(self, encoder, inputs, encoded) -> None:
        self.encoded = encoded

    def result(self) -> dict:
        """For JSON; AP in percent, milliseconds per image, multiply-adds of an image of ``size``."""
        with contextlib.redirect_stdout(io.StringIO()):
            found = self.evaluator.evaluate(self.images if self.run.limit else None)["bbox"]
        if self.budget is not None:
            self.run.predict.keep_ratio = self.budget
        low, median, high = np.percentile(self.milliseconds, (25, 50, 75))
        adaptive = isinstance(self.budget, MeanRatio)
        return {
            "run": self.run.name,
            "keep_ratio": None if self.budget is None else float(self.budget),
            "adaptive": adaptive,
            "rule": repr(self.budget) if adaptive else None,
            "AP": found["AP"],
            "AP50": found["AP50"],
            "macs": analyze(self.run.predict.model, self.run.size).total.macs,
            "size": list(self.run.size),
            "milliseconds": {
                "median": median,
                "quartiles": [low, high],
                "mean": float(np.mean(self.milliseconds)),
            },
            "kept": self.kept / self.tokens if self.tokens else None,
            "images": len(self.images),
        }


def points_of(run: Run, ratios: Sequence[float] | None, adaptive: bool) -> list[Point]:
    if run.predict.keep_ratio is None:
        return [Point(run, None)]
    if ratios is None:
        low, high = keep_ratio_range(run.predict.model)
        ratios = sorted({low, high, *(ratio for ratio in RATIOS if low < ratio < high)})
    budgets = list(ratios)
    if adaptive:
        shown = tqdm(run.batches(), f"{run.name}: calibrating", len(run), unit="image")
        rankings = token_rankings(run.predict.model, shown)
        budgets += [MeanRatio.calibrate(rankings, ratio) for ratio in ratios if ratio < 1]
    return [Point(run, budget) for budget in budgets]


def measure(runs: list[Run], points: list[Point]) -> list[dict]:
    """All points on all images; the results in the order of ``points``."""
    order = random.Random(0)
    rounds = itertools.zip_longest(*(run.batches() for run in runs))
    for batches in tqdm(rounds, "images", max(map(len, runs)), unit="image"):
        turn = [
            (point, batch)
            for run, batch in zip(runs, batches)
            if batch
            for point in points
            if point.run is run
        ]
        order.shuffle(turn)
        for run, batch in zip(runs, batches):
            run.sizes += [tuple(entry["image"].shape[1:]) for entry in batch or ()]
        for point, batch in turn:
            point.take(batch)
    return [point.result() for point in tqdm(points, "evaluating", unit="point")]


def table(results: list[dict]) -> str:
    rows = [
        (
            r["run"],
            "-" if r["keep_ratio"] is None else f"{r['keep_ratio']:g}" + " per image" * r["adaptive"],
            f"{r['AP']:.1f}",
            f"{r['AP50']:.1f}",
            f"{r['macs'] / 1e9:.2f}",
            f"{r['milliseconds']['median']:.1f}",
            "{:.1f} to {:.1f}".format(*r["milliseconds"]["quartiles"]),
            f"{r['milliseconds']['mean']:.1f}",
            "-" if r["kept"] is None else f"{r['kept']:.1%}",
        )
        for r in results
    ]
    headers = ["run", "keep ratio", "AP", "AP50", "GMACs", "ms, median", "quartiles", "mean", "kept tokens"]
    return tabulate(rows, headers, "simple", colalign=("left", "left", *["right"] * 7), disable_numparse=True)


def draw(results: list[dict], path: Path) -> None:
    """AP over milliseconds, a line for each run; the bars are the quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="milliseconds per image, median and quartiles", ylabel="AP x 100")
    lines = itertools.groupby(results, key=lambda r: (r["run"], r["adaptive"]))
    for (run, adaptive), points in lines:
        group = list(points)
        median = np.array([r["milliseconds"]["median"] for r in group])
        low, high = np.array([r["milliseconds"]["quartiles"] for r in group]).T
        ap = [r["AP"] for r in group]
        axes.errorbar(
            median,
            ap,
            xerr=(median - low, high - median),
            fmt="s--" if adaptive else "o-",
            elinewidth=0.6,
            label=run + ", budgets per image" * adaptive,
        )
        for r, x, y in zip(group, median, ap):
            if r["keep_ratio"] is not None and not adaptive:
                axes.annotate(f"{r['keep_ratio']:g}", (x, y), (0, 5), textcoords="offset points", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = flags.parser(__doc__)
    parser.add_argument(
        "--run",
        nargs="+",
        required=True,
        metavar="DIR",
        help="output folders of runs; their last checkpoints",
    )
    parser.add_argument(
        "--keep-ratio",
        nargs="+",
        type=float,
        metavar="RATIO",
        help=f"token budgets (default: {' '.join(f'{r:g}' for r in RATIOS)}, in the range of the training)",
    )
    parser.add_argument(
        "--adaptive", action="store_true", help="each budget also as a mean, with one for each image"
    )
    parser.add_argument("--images", type=int, metavar="N", help="the first N only (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--output", metavar="FILE", help="draw AP over milliseconds there (needs matplotlib)")
    flags.add_dtype(parser)
    flags.add_device(parser)
    flags.add_opts(parser)
    args = parser.parse_args(arguments)
    for ratio in args.keep_ratio or ():
        if not 0 < ratio <= 1:
            raise UserError(f"--keep-ratio {ratio} must lie in (0, 1]")
    if args.output:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--output needs matplotlib: pip install matplotlib") from None
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    runs, points = [], []
    for folder in dict.fromkeys(args.run):
        runs.append(Run(folder, args))  # then the evaluators: runs may call their sets by the same name
        points += points_of(runs[-1], args.keep_ratio, args.adaptive)
    results = measure(runs, points)
    print(table(results))
    for run in runs:
        print(f"{run.name}: {len(run)} images; GMACs at {run.size[0]}x{run.size[1]}")
    for file in filter(None, (args.json, args.output)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    if args.output:
        draw(results, Path(args.output))
