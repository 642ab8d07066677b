"""Parameters and multiply-adds of a model, module by module.

    sparse-detr analyze --config-file sparse_detr/sparse_detr_r50_10_50ep
    sparse-detr analyze --config-file output/my_run
    sparse-detr analyze --config-file ... --size 850x1040 --depth 3 --json costs.json
    sparse-detr analyze --config-file ... model.transformer.encoder.keep_ratio=0.5

`--config-file` takes a file, a run's folder or the name of a shipped config. What is counted, and how
the numbers relate to the papers', is in docs/flops.md.
"""

import json
from pathlib import Path

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf

from .. import config
from ..analysis import COUNTED, analyze
from . import flags


def test_size(cfg: DictConfig) -> tuple[int, int]:
    """Height and width of an image of 4:3 in the config's evaluation, or of the square that it becomes."""
    resize = OmegaConf.select(cfg, "dataloader.test.mapper.augmentations") or {}
    if side := resize.get("size"):
        return side, side
    short = resize.get("short_edge") or 800
    return short, min(short * 4 // 3, resize.get("max_size") or 1333)


def main() -> None:
    parser = flags.parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--size",
        type=flags.image_size,
        metavar="HxW",
        help="network input in pixels, height x width (default: a 4:3 image as the config resizes it for "
        "evaluation, 800x1066 for COCO)",
    )
    parser.add_argument("--depth", type=int, default=2, help="levels of modules (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write all modules there")
    flags.add_overrides(parser)
    args = parser.parse_args()

    cfg = config.load_config(args.config_file, args.opts)
    config.resolve_classes(cfg)
    size = args.size or test_size(cfg)
    analysis = analyze(instantiate(cfg.model), size)
    print(*[args.config_file, *args.opts], "at {}x{}, one image\n".format(*size))
    print(analysis.table(args.depth))
    print(f"\n{COUNTED}")
    if args.json:
        found = {"config": args.config_file, "overrides": args.opts, **analysis.as_dict()}
        Path(args.json).write_text(json.dumps(found, indent=1))
