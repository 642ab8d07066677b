#!/usr/bin/env python
"""Parameters and multiply-adds of a model, module by module.

    python tools/analyze_model.py --config-file sparse_detr/sparse_detr_r50_10_50ep
    python tools/analyze_model.py --config-file ... --size 850x1040 --depth 3 --json costs.json
    python tools/analyze_model.py --config-file ... model.transformer.encoder.keep_ratio=0.5

`--config-file` takes a file or the name of a shipped config. What is counted, and how the numbers
relate to the papers', is in docs/flops.md.
"""

import argparse
import importlib.util
import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=r"`torch\.jit\.")  # detectron2's import
if importlib.util.find_spec("sparse_detr") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects"))

from detectron2.config import instantiate  # noqa: E402

from sparse_detr import config  # noqa: E402
from sparse_detr.analysis import COUNTED, analyze  # noqa: E402
from sparse_detr.errors import told_in_one_line  # noqa: E402


def image_size(text: str) -> tuple[int, int]:
    """ "800x1066" -> (800, 1066), height first."""
    height, width = (int(side) for side in text.lower().split("x"))
    return height, width


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--size",
        type=image_size,
        default=(800, 1066),
        metavar="HxW",
        help="network input in pixels, height x width (default: 800x1066)",
    )
    parser.add_argument("--depth", type=int, default=2, help="levels of modules (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write all modules there")
    parser.add_argument("opts", nargs="*", help="config overrides, path.key=value")
    args = parser.parse_args()

    cfg = config.load_config(args.config_file, args.opts)
    config.resolve_classes(cfg)
    analysis = analyze(instantiate(cfg.model), args.size)
    print(*[args.config_file, *args.opts], "at {}x{}, one image\n".format(*args.size))
    print(analysis.table(args.depth))
    print(f"\n{COUNTED}")
    if args.json:
        found = {"config": args.config_file, "overrides": args.opts, **analysis.as_dict()}
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    with told_in_one_line():
        main()
