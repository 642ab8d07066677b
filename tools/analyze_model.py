#!/usr/bin/env python
"""Parameters and multiply-adds of a model, module by module.

    python tools/analyze_model.py --config-file sparse_detr/sparse_detr_r50_10_50ep
    python tools/analyze_model.py --config-file ... --size 850x1040 --depth 3 --json costs.json
    python tools/analyze_model.py --config-file ... model.transformer.encoder.keep_ratio=0.5

`--config-file` takes a file or the name of a shipped config. What is counted, and how the numbers
relate to the papers', is in docs/flops.md.
"""

import json
from pathlib import Path

import _checkout
from detectron2.config import instantiate

from sparse_detr import config
from sparse_detr.analysis import COUNTED, analyze


def main() -> None:
    parser = _checkout.parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--size",
        type=_checkout.image_size,
        default=(800, 1066),
        metavar="HxW",
        help="network input in pixels, height x width (default: 800x1066)",
    )
    parser.add_argument("--depth", type=int, default=2, help="levels of modules (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write all modules there")
    _checkout.add_overrides(parser)
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
    _checkout.run(main)
