#!/usr/bin/env python
"""What models learn: trainings of several seeds, AP as mean and half of the range.

    python benchmarks/learning.py --json output/learning.json --seeds 42 43 44 \\
        "dense=quick/deformable_detr_r50_custom" "Sparse .3=quick/sparse_detr_r50_custom" \\
        "elastic=quick/sparse_detr_r50_custom model.transformer.encoder.elastic=[0.05,1]" \\
        --keep-ratio 0.1 0.3 1 \\
        --common data.train_json=train.json data.train_images=train/ \\
                 data.val_json=val.json data.val_images=val/ train.max_iter=300

Each run is train_net.py with train.seed and train.output_dir set, then tools/tradeoff.py, one image at a
time: where the model has a keep ratio, at those asked for (else at that script's own). All models of one seed
come before the next. JSON and table are written after each run; a run that the JSON holds is not repeated,
and one that was interrupted goes on (its seconds are then those of the rest).
"""

import hashlib
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import _checkout

from benchmarks.report import markdown, named_config, write_json

ROOT = Path(__file__).resolve().parents[1]


def processor_seconds() -> float:
    """Of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def script(name: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")


def learn(config: str, overrides: list[str], folder: Path, ratios: list[float]) -> dict:
    """Trains into ``folder``; seconds, and AP in percent at each keep ratio ("dense": without one)."""
    begin, before = time.perf_counter(), processor_seconds()
    script("train_net.py", "--resume", "--config-file", config, f"train.output_dir={folder}", *overrides)
    seconds = {"seconds": time.perf_counter() - begin, "processor_seconds": processor_seconds() - before}
    found = folder / "tradeoff.json"
    asked = ["--keep-ratio", *ratios] if ratios else []
    script("tools/tradeoff.py", "--run", folder, "--json", found, *asked)
    results = {}
    for point in json.loads(found.read_text()):
        ratio = point["keep_ratio"]
        results["dense" if ratio is None else f"{ratio:g}"] = {k: point[k] for k in ("AP", "AP50", "macs")}
    return {**seconds, "results": results}


def table(runs: list[dict]) -> str:
    names = list(dict.fromkeys(run["name"] for run in runs))
    ratios = sorted({r for run in runs for r in run["results"]}, key=lambda r: (r != "dense", r))
    rows = []
    for name in names:
        own = [run for run in runs if run["name"] == name]
        cells = []
        for ratio in ratios:
            ap = [run["results"][ratio]["AP"] for run in own if ratio in run["results"]]
            cells.append(f"{mean(ap):.1f} ± {(max(ap) - min(ap)) / 2:.1f}" if ap else "")
        minutes = mean(run["seconds"] for run in own) / 60
        rows.append([name, *cells, len(own), f"{minutes:.1f}"])
    return markdown(["AP", *ratios, "seeds", "minutes"], rows)


def main() -> None:
    parser = _checkout.parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="[NAME=]CONFIG [key=value ...]", help="quoted")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--common", nargs="+", default=[], metavar="key=value", help="of all models")
    parser.add_argument("--keep-ratio", type=float, nargs="+", default=[], help="to evaluate at")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("output/learning"), metavar="DIR")
    args = parser.parse_args()
    models = [named_config(text) for text in args.models]
    runs = json.loads(args.json.read_text())["runs"] if args.json.exists() else []
    for seed in args.seeds:
        for name, config, overrides in models:
            settings = [config, *args.common, *overrides, f"train.seed={seed}"]
            what = {"name": name, "seed": seed, "settings": settings, "keep_ratio": args.keep_ratio}
            if any(what.items() <= run.items() for run in runs):
                continue
            digest = hashlib.sha256(" ".join(settings).encode()).hexdigest()[:8]  # one folder, one run
            folder = args.output / f"{re.sub('[^0-9A-Za-z.]+', '_', name)}_{seed}_{digest}"
            print(f"{name}, seed {seed}: {folder}", flush=True)
            runs.append({**what, **learn(config, settings[1:], folder, args.keep_ratio)})
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.json, {"runs": runs})
            print(table(runs), flush=True)
    print(table(runs))


if __name__ == "__main__":
    _checkout.run(main)
