#!/usr/bin/env python
"""What could token budgets per image win? AP of keep ratios that follow the annotations.

    python benchmarks/budgets.py --run output/my_run --mean 0.1 0.2

An image's ratio is in proportion to the true number of its objects, to the share of the image that they
cover, or to one over their number, between half and twice the mean; the mean over the images is the same for
all. No rule that reads the scores knows as much: what these do not win, it will not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import _checkout
import numpy as np
from detectron2.config import instantiate
from tabulate import tabulate
from tqdm import tqdm

from sparse_detr.cli import flags
from sparse_detr.cli.tradeoff import Point, Run


def in_proportion(values: np.ndarray, mean: float) -> np.ndarray:
    """Keep ratios in proportion to ``values`` (above 0), within ``mean / 2`` and ``2 * mean``."""
    scale = mean / values.mean()
    for _ in range(50):  # what the limits take away, the others get
        ratios = np.clip(values * scale, mean / 2, min(2 * mean, 1.0))
        scale *= mean / ratios.mean()
    return ratios


def wanted(images: list[dict], mean: float) -> dict[str, dict[int, float]]:
    """Of each rule, the keep ratio of every image by its id."""
    count = np.array([len(image["annotations"]) for image in images], dtype=float)
    sizes = [[np.prod(box["bbox"][2:]) for box in image["annotations"]] for image in images]
    area = np.array([sum(boxes) / (image["width"] * image["height"]) for boxes, image in zip(sizes, images)])
    rules = {
        "the same": np.ones(len(images)),
        "objects": count.clip(1e-3),
        "their area": area.clip(1e-3),
        "the fewer, the more": 1 / count.clip(1),
    }
    ids = [image["image_id"] for image in images]
    return {name: dict(zip(ids, in_proportion(values, mean))) for name, values in rules.items()}


def main() -> None:
    parser = _checkout.parser(__doc__)
    parser.add_argument("--run", required=True, metavar="DIR", help="output folder of a run")
    parser.add_argument("--mean", nargs="+", type=float, default=[0.1, 0.2], metavar="RATIO")
    flags.add_dtype(parser)
    flags.add_device(parser)
    flags.add_opts(parser)
    args = parser.parse_args()
    args.images = None
    run = Run(args.run, args)
    images = instantiate(run.cfg.dataloader.test.dataset)
    rules = [(mean, name, ratios) for mean in args.mean for name, ratios in wanted(images, mean).items()]
    points = [Point(run, mean) for mean, _, _ in rules]
    for batch in tqdm(run.batches(), "images", len(run), unit="image"):
        run.sizes += [tuple(entry["image"].shape[1:]) for entry in batch]
        for point, (_, _, ratios) in zip(points, rules):
            point.budget = float(ratios[batch[0]["image_id"]])
            point.take(batch)
    rows = []
    for point, (mean, name, _) in zip(points, rules):
        found = point.result()
        rows.append((mean, name, f"{found['AP']:.1f}", f"{found['AP50']:.1f}", f"{found['kept']:.1%}"))
    print(tabulate(rows, ["mean", "in proportion to", "AP", "AP50", "kept tokens"], disable_numparse=True))


if __name__ == "__main__":
    _checkout.run(main)
