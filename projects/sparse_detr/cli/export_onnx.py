"""Write a trained detector as an ONNX file, and compare it with PyTorch in onnxruntime.

    sparse-detr export --run output/my_run --output model.onnx
    sparse-detr export --config-file dino/dino_r50_4scale_12ep --weights model.pth
    sparse-detr export --run output/my_run --output model.onnx --fixed --size 800x1344

The file takes images of any height and width, unless --fixed. Its metadata hold the channel order,
the class names and the resizing of the test set. The last lines give the largest difference in score
and box coordinate (pixels) on random images; more than --tolerance is an error.
"""

import argparse
import logging
import os
import sys

from ..export import compare_onnx, export_onnx
from ..predictor import Predictor
from . import flags


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.parser(__doc__)
    flags.add_model(parser)
    parser.add_argument("--output", default="model.onnx", metavar="FILE")
    parser.add_argument(
        "--size",
        type=flags.image_size,
        default=(480, 640),
        metavar="HxW",
        help="of the traced image (default: 480x640)",
    )
    flags.add_keep_ratio(parser)
    parser.add_argument("--fixed", action="store_true", help="accept only images of --size")
    parser.add_argument("--no-check", action="store_true", help="do not run onnxruntime")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="(default: 0.01)")
    flags.add_overrides(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # "Skipping constant folding", per layer
    predict = Predictor(
        args.run or args.config_file,
        args.weights,
        overrides=args.opts,
        device="cpu",
        keep_ratio=args.keep_ratio,
    )
    metadata = {"classes": predict.class_names, **predict.resizing}
    export_onnx(predict.model, args.output, args.size, dynamic=not args.fixed, metadata=metadata)
    print(f"{args.output}: {os.path.getsize(args.output) / 1e6:.1f} MB")
    if args.no_check:
        return
    height, width = args.size
    sizes = [args.size] if args.fixed else [args.size, (width, height + 32)]
    errors = compare_onnx(predict.model, args.output, sizes)
    for (height, width), (score, box) in errors.items():
        print(f"{height}x{width}: largest difference to PyTorch: score {score:.1e}, box {box:.1e} px")
    worst = max(max(pair) for pair in errors.values())
    if worst > args.tolerance:
        sys.exit(f"error: {worst:.1e} is more than --tolerance {args.tolerance}")
