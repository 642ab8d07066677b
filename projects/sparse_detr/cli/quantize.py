"""Write a trained detector in int8, for CPUs, and compare it with float32.

    sparse-detr quantize --run output/my_run
    sparse-detr quantize --run output/my_run --input photos/ --images 64 --output int8.pth
    sparse-detr quantize --run output/my_run --evaluate

Without training: ranges are taken from images, of --input or, without it, of the run's training set,
resized as for its test set; annotations are not used. The last lines compare detections and milliseconds in
float32, in the precision of --dtype, and in int8 with the rest in that; --evaluate adds the AP on the run's
validation set. Needs torchao. How to use the file: docs/quantize.md.
"""

import argparse
import contextlib
import copy
import io
import os
import random
import statistics
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import instantiate
from detectron2.structures import Instances, pairwise_iou
from tabulate import tabulate
from tqdm import tqdm

from ..bulk import find_files
from ..data.image import read_image
from ..devices import clock, mixed_precision, resolve_dtype
from ..engine.checks import has_test_set
from ..errors import UserError
from ..modeling import SetDetector
from ..predictor import Predictor
from ..quantize import load, quantize, save
from . import flags

SCORE, IOU = 0.3, 0.9  # of the detections that are compared, and from which on two boxes are the same
COMPARED = 16  # images


def calibration(predict: Predictor, inputs: Sequence[str], limit: int) -> list[list[dict]]:
    """Batches of one image each, drawn from the files, or from the training set of the config."""
    if inputs:
        files = find_files(inputs)
        chosen = random.Random(0).sample(files, min(limit, len(files)))
        return [[predict.prepare(read_image(name, predict.input_format))] for name in tqdm(chosen, "reading")]
    dataset = instantiate(predict.cfg.dataloader.train.dataset)
    mapper = instantiate(predict.cfg.dataloader.test.mapper)
    entries = random.Random(0).sample(list(dataset), min(limit, len(dataset)))
    return [[mapper(copy.deepcopy(entry))] for entry in tqdm(entries, "reading")]


class Contender:
    """A detector in one precision: what it finds, and how long it takes."""

    def __init__(self, model: SetDetector, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.milliseconds: list[float] = []
        self.found: list[Instances] = []

    @torch.no_grad()
    def __call__(self, batch: list[dict]) -> list[dict]:
        start = clock(self.model.device)
        with mixed_precision(self.model.device, self.dtype):
            results = self.model(batch)
        self.milliseconds.append(1e3 * (clock(self.model.device) - start))
        return results


def agreement(found: Instances, expected: Instances) -> tuple[int, int]:
    """Of the expected detections with a score of at least SCORE: how many ``found`` has, of the same class,
    with an IoU of at least IOU and at least half of SCORE; and how many there are."""
    expected, found = expected[expected.scores >= SCORE], found[found.scores >= SCORE / 2]
    same = pairwise_iou(expected.pred_boxes, found.pred_boxes) >= IOU
    same &= expected.pred_classes[:, None] == found.pred_classes
    return int(same.any(1).sum()), len(expected)


def compare(contenders: dict[str, Contender], batches: Sequence[list[dict]]) -> None:
    """All contenders on all images, in turns of a new order; the first call of each counts for nothing."""
    order = random.Random(0)
    for contender in contenders.values():
        contender(batches[0])
        contender.milliseconds.clear()
    for batch in tqdm(batches, "comparing", unit="image"):
        for contender in order.sample(list(contenders.values()), len(contenders)):
            contender.found.append(contender(batch)[0]["instances"])


def average_precision(predict: Predictor, contender: Contender, name: str) -> float:
    """On the validation set, one image at a time, in percent."""
    cfg = copy.deepcopy(predict.cfg)
    cfg.dataloader.test.batch_size = 1
    cfg.dataloader.evaluator.output_dir = None
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    evaluator.reset()
    for batch in tqdm(loader, f"{name}: validation set", unit="image"):
        evaluator.process(batch, contender(batch))
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()["bbox"]["AP"]


def rows(contenders: dict[str, Contender], precisions: dict[str, float]) -> Iterator[list[str]]:
    base = next(iter(contenders.values()))
    for name, contender in contenders.items():
        pairs = [agreement(*pair) for pair in zip(contender.found, base.found)]
        same, count = (sum(column) for column in zip(*pairs))
        faster = statistics.median(b / m for b, m in zip(base.milliseconds, contender.milliseconds))
        yield [
            name,
            f"{statistics.median(contender.milliseconds):.1f}",
            f"{faster:.2f}x",
            f"{same} of {count}",
            *([f"{precisions[name]:.2f}"] if precisions else []),
        ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = flags.parser(__doc__)
    flags.add_model(parser)
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="images to take the ranges from: files, folders, globs, lists (default: the training set)",
    )
    parser.add_argument("--images", type=int, default=64, metavar="N", help="how many of them (default: 64)")
    parser.add_argument("--output", metavar="FILE", help="(default: int8.pth, in the run's folder)")
    parser.add_argument("--evaluate", action="store_true", help="the AP on the validation set as well")
    parser.add_argument(
        "--dtype", default="auto", help='of what int8 is not for: "float32", "bfloat16" (default: auto)'
    )
    flags.add_keep_ratio(parser)
    flags.add_opts(parser)
    args = parser.parse_args(arguments)
    if args.images < 1:
        parser.error(f"--images {args.images}: expected at least 1")
    args.output = args.output or os.path.join(args.run or "", "int8.pth")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    source = args.run or args.config_file
    predict = Predictor(source, args.weights, overrides=args.opts, device="cpu", keep_ratio=args.keep_ratio)
    if args.evaluate and not has_test_set(predict.cfg):
        raise UserError(f"{source} has no validation set: pass --opts data.val_json=... data.val_images=...")
    dtype = resolve_dtype(args.dtype, predict.model.device, "--dtype")
    batches = calibration(predict, args.input, args.images)
    programs = quantize(predict.model, tqdm(batches, "calibrating", unit="image"))
    save(args.output, predict, programs)
    print(f"{args.output}: {os.path.getsize(args.output) / 1e6:.1f} MB")

    contenders = {"float32": Contender(predict.model, torch.float32)}
    rest = str(dtype).removeprefix("torch.")
    contenders.setdefault(rest, Contender(predict.model, dtype))
    int8 = load(args.output, dtype=dtype).model
    contenders["int8" if dtype == torch.float32 else f"int8, {rest}"] = Contender(int8, dtype)
    compare(contenders, batches[:COMPARED])
    head = ["", "ms, median", "faster", f"same detections from {SCORE:g}"]
    precisions = {}
    if args.evaluate:
        head.append("AP")
        precisions = {name: average_precision(predict, one, name) for name, one in contenders.items()}
    aligned = ("left", *["right"] * (len(head) - 1))
    print(
        tabulate(list(rows(contenders, precisions)), head, "simple", colalign=aligned, disable_numparse=True)
    )
    print(f"on {min(COMPARED, len(batches))} of the calibration's images, {torch.get_num_threads()} threads")
