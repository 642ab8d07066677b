#!/usr/bin/env python
"""Write a trained detector as an ONNX file, and compare it with PyTorch in onnxruntime.

    python tools/export_onnx.py --run output/my_run --output model.onnx
    python tools/export_onnx.py --config-file dino/dino_r50_4scale_12ep --weights model.pth
    python tools/export_onnx.py --run output/my_run --output model.onnx --fixed --size 800x1344

The file takes images of any height and width, unless --fixed. Its metadata hold the channel order,
the class names and the resizing of the test set. The last lines give the largest difference in score
and box coordinate (pixels) on random images; more than --tolerance is an error.
"""

import argparse
import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=r"`torch\.jit\.")  # detectron2's import
if importlib.util.find_spec("sparse_detr") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "projects"))

from sparse_detr.errors import told_in_one_line  # noqa: E402
from sparse_detr.export import compare_onnx, export_onnx  # noqa: E402
from sparse_detr.predictor import Predictor  # noqa: E402


def size(text: str) -> tuple[int, int]:
    height, width = (int(part) for part in text.lower().split("x"))
    return height, width


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="output folder of a run; its last checkpoint")
    source.add_argument("--config-file", metavar="FILE", help="a config or a shipped one's name")
    parser.add_argument("--weights", default="", metavar="FILE", help="a checkpoint")
    parser.add_argument("--output", default="model.onnx", metavar="FILE")
    parser.add_argument(
        "--size", type=size, default=(480, 640), metavar="HxW", help="of the traced image (default: 480x640)"
    )
    parser.add_argument(
        "--keep-ratio",
        type=float,
        metavar="RATIO",
        help="share of tokens the encoder refreshes, instead of the config's",
    )
    parser.add_argument("--fixed", action="store_true", help="accept only images of --size")
    parser.add_argument("--no-check", action="store_true", help="do not run onnxruntime")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="(default: 0.01)")
    parser.add_argument("opts", nargs="*", help="config overrides, path.key=value")
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


if __name__ == "__main__":
    with told_in_one_line():
        main()
