#!/usr/bin/env python
"""Does ``Predictor(latency_ms=...)`` keep its promise? Percentiles of calls at several targets.

    python benchmarks/dial.py --run output/my_run --images photos/ --count 200
    python benchmarks/dial.py --run output/my_run --images photos/ --size 480x640 --targets 0.1 0.5 0.9

The targets lie so far between the fastest and the slowest setting, as the dial measures them first. Each
starts with a predictor that knows nothing. `--cpu-time` counts the process's own time instead of the
clock's: on a machine that others use, too, what a call takes is not the detector's alone.
"""

import json
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import _checkout
import numpy as np
import torch
from tabulate import tabulate
from tqdm import trange

from sparse_detr import Predictor
from sparse_detr.data import read_image
from sparse_detr.dial import PERCENTILE


def main() -> None:
    parser = _checkout.parser(__doc__)
    parser.add_argument("--run", required=True, metavar="DIR", help="output folder of a run")
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder of images")
    parser.add_argument("--count", type=int, default=200, help="calls per target (default: 200)")
    parser.add_argument("--size", default="", metavar="SHORTxLONG", help="limits of the network's input")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sparse_detr.dial").setLevel(logging.INFO)

    overrides = []
    if args.size:
        short, long = args.size.split("x")
        resize = "dataloader.test.mapper.augmentations"
        overrides = [f"{resize}.short_edge={short}", f"{resize}.max_size={long}"]
    predict = Predictor(args.run, overrides=overrides, device=args.device, latency_ms=1e9)
    clock = time.process_time if args.cpu_time else predict._clock
    predict._clock = clock
    predict.latency_ms = 1e9  # with that clock
    images = [read_image(str(path), "BGR") for path in sorted(Path(args.images).iterdir())]
    predict(images[0])
    (line,) = predict._dial.lines.values()
    fastest, slowest = line.limits()
    rows = []
    for share in args.targets:
        target = 1e3 * (fastest + share * (slowest - fastest))
        predict.latency_ms = target
        predict(images[0])  # measures
        taken, ratios = [], []
        for number in trange(args.count, desc=f"{target:.0f} ms"):
            start = clock()
            predict(images[number % len(images)])
            taken.append(1e3 * (clock() - start))
            ratios.append(predict.keep_ratio)
        found = np.array(taken)
        rows.append(
            {
                "target": target,
                "p50": float(np.percentile(found, 50)),
                f"p{PERCENTILE}": float(np.percentile(found, PERCENTILE)),
                "within 10 %": float((abs(found / target - 1) <= 0.1).mean()),
                "up to 10 % above": float((found <= 1.1 * target).mean()),
                "keep ratios": sorted(set(ratios)),
            }
        )
        print({key: value for key, value in rows[-1].items()}, flush=True)
    print(
        tabulate(
            [{**row, "keep ratios": f"{row['keep ratios'][0]} to {row['keep ratios'][-1]}"} for row in rows],
            "keys",
            floatfmt=".3g",
        )
    )
    if args.json:
        found = {"fastest": 1e3 * fastest, "slowest": 1e3 * slowest, "targets": rows}
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    _checkout.run(main)
