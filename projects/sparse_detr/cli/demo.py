"""``make demo``: trains a small detector from scratch, evaluates it and draws what it finds.

    sparse-detr demo [--config-file FILE] [--output-dir DIR] [train.max_iter=100 ...]

The data are drawn from a seed (sparse_detr.data.synthetic); nothing is downloaded. On two CPU cores
it takes a few minutes. The same as ``sparse-detr train`` on that config, and pictures.
"""

import os
import shutil
import time
from pathlib import Path

from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser
from PIL import Image
from tabulate import tabulate

from .. import build_model, config, overlays
from ..report import write_page
from . import flags, train

PICTURES = 8
OWN_FOLDER = "output/demo"


def draw(output_dir: str) -> list[str]:
    """Draws images of the test set with the run's final weights; returns the paths."""
    cfg = config.load_config(os.path.join(output_dir, "config.yaml"))
    dataset = instantiate(cfg.dataloader.test.dataset)
    mapper = instantiate(cfg.dataloader.test.mapper)
    metadata = MetadataCatalog.get(cfg.dataloader.test.dataset.names)
    weights = os.path.join(output_dir, "model_final.pth")
    model = build_model(cfg, weights, device=cfg.train.device)

    folder = os.path.join(output_dir, "pictures")
    os.makedirs(folder, exist_ok=True)
    paths = []
    for record in dataset[:: max(1, len(dataset) // PICTURES)][:PICTURES]:
        picture = overlays.draw_example(model, record, mapper, metadata, threshold=0.4, scale=3)
        paths.append(os.path.join(folder, Path(record["file_name"]).stem + ".png"))
        Image.fromarray(picture).save(paths[-1])
    return paths


def table(results: dict[str, float]) -> str:
    """COCOEvaluator's box results as a table, 0 to 1."""
    totals = [(k, v / 100) for k, v in results.items() if "-" not in k]
    classes = [(k.removeprefix("AP-"), v / 100) for k, v in results.items() if "-" in k]
    return "\n\n".join(
        [
            tabulate([[v for _, v in totals]], [k for k, _ in totals], "github", ".3f"),
            tabulate(classes, ["class", "AP"], "github", ".3f"),
        ]
    )


def main() -> None:
    parser = flags.parser(__doc__)
    parser.add_argument("--config-file", default="quick/sparse_detr_shapes", metavar="FILE")
    parser.add_argument("--output-dir", metavar="DIR", help=f"default: {OWN_FOLDER}, emptied first")
    flags.add_overrides(parser)
    args = parser.parse_args()

    if args.output_dir is None:
        args.output_dir = OWN_FOLDER
        shutil.rmtree(OWN_FOLDER, ignore_errors=True)  # a folder takes one run
    start = time.perf_counter()
    overrides = [f"train.output_dir={os.path.abspath(args.output_dir)}", *args.opts]
    command = ["--config-file", args.config_file, *overrides]
    results = train.run_process(default_argument_parser().parse_args(command))
    pictures = draw(args.output_dir)
    page = os.path.join(args.output_dir, "report.html")
    write_page([args.output_dir], page)
    print(f"\n{table(results['bbox'])}\n")
    print(f"{time.perf_counter() - start:.0f} s; log, weights and metrics are in {args.output_dir}")
    print(f"AP50: {results['bbox']['AP50'] / 100:.2f}")
    print("pictures (ground truth | detections | kept tokens):", *pictures, sep="\n  ")
    print(f"curves, AP by class, the worst errors, to open in a browser: {page}")
