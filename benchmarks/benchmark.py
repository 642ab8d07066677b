#!/usr/bin/env python
"""How fast, against what, on this machine: paired ratios measured in one run.

    python benchmarks/benchmark.py op                              deformable attention, 1 thread
    python benchmarks/benchmark.py op --device cuda --json op.json
    python benchmarks/benchmark.py op --peer mine=file.py:function
    python benchmarks/benchmark.py model deformable_detr/deformable_detr_r50_efficient_50ep \\
        sparse_detr/sparse_detr_r50_10_50ep                   whole models; the first is the base
    python benchmarks/benchmark.py model "DINO=dino/dino_r50_4scale_12ep" \\
        "Focus .3=focus_detr/focus_detr_r50_4scale_12ep model.transformer.encoder.keep_ratio=0.3" \\
        --train --size 800x1066 --peer published=file.py:function

`op` first checks that all contenders compute the same. An op peer is called as
`function(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)`, a model
peer without arguments and returns a module that is called with an image (1, 3, H, W). Contenders take
turns; a ratio is the median over rounds, with its quartiles in brackets. "Of the limit" is the share
of the time that a model's multiply-adds would take at the machine's rate for large products, measured
in the same run. Peers: benchmarks/peers.py. Measure on a quiet machine.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import _checkout
import torch

from benchmarks import ops
from benchmarks.report import machine, markdown, megabytes, milliseconds, write_json
from benchmarks.timing import Timing, product_rate


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _checkout.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    common.add_argument("--threads", type=int, help="CPU threads (op: 1, model: all)")
    common.add_argument("--rounds", type=int, help="how often all take turns (op: 15, model: 7)")
    common.add_argument("--peer", action="append", default=[], metavar="NAME=WHERE:FUNCTION")
    common.add_argument("--json", metavar="FILE", help="write every measurement there")
    op = commands.add_parser("op", parents=[common], help="deformable attention")
    op.add_argument(
        "--kinds",
        nargs="+",
        default=list(ops.KINDS),
        choices=ops.KINDS,
        metavar="KIND",
        help=f"which queries: {', '.join(ops.KINDS)} (default: all)".replace("%", "%%"),
    )
    op.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    op.add_argument("--scale", type=float, default=1.0, help="shrink the maps' sides (for a trial)")
    op.add_argument("--compile", action="store_true", help="torch.compile the formulation as well")
    model = commands.add_parser("model", parents=[common], help="whole detectors")
    model.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]CONFIG [key=value ...]",
        help="a shipped config or a file, quoted together with its overrides",
    )
    model.add_argument("--size", type=_checkout.image_size, default=(800, 1066), metavar="HxW")
    model.add_argument("--batch", type=int, default=1, help="images per call (default: 1)")
    model.add_argument("--bf16", action="store_true", help="each of our models in bfloat16 as well")
    model.add_argument("--tf32", action="store_true", help="and in tf32 (GPU)")
    model.add_argument("--int8", action="store_true", help="and in int8 (CPU; needs torchao)")
    model.add_argument("--graph", action="store_true", help="and each of these as a CUDA graph (GPU)")
    model.add_argument("--compile", action="store_true", help="and through torch.compile (takes minutes)")
    model.add_argument("--train", action="store_true", help="a training step too: time and memory")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (15 if args.command == "op" else 7)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
    if args.command == "model" and args.batch < 1:
        parser.error("--batch must be at least 1")
    if args.command == "model" and args.device == "cpu" and (args.tf32 or args.graph):
        parser.error("--tf32, --graph: with --device cuda")
    if args.command == "model" and args.int8 and (args.device != "cpu" or args.train):
        parser.error("--int8: for inference on a CPU, without --train and --device cuda")
    return args


def ratio(ours: Timing, other: Timing) -> str:
    middle, low, high = ours.ratio(other)
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"


def benchmark_ops(args: argparse.Namespace) -> tuple[str, list[dict]]:
    torch.set_num_threads(args.threads or 1)
    dtype = getattr(torch, args.dtype)
    levels = ops.scaled_levels(args.scale)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    results = []
    for task in ops.tasks(args.peer, args.compile, dtype):
        # Points anywhere: from cell centres, offsets of few digits end on the lines where slopes jump.
        small = ops.problem("decoder 300", ops.scaled_levels(args.scale / 8), args.device, dtype, 0)
        ops.check(task, small, tolerance)
        for kind in args.kinds:
            results += ops.measure(task, kind, levels, dtype, args.rounds, args.device)
    for kind in args.kinds:
        if kind.startswith("decoder"):
            results.append(ops.measure_splat(kind, levels, args.rounds, args.device))
    rows, records = [], []
    for found in results:
        ours = found.timings[ops.OURS]
        for name, timing in found.timings.items():
            rows.append(
                [
                    f"{found.task}, {found.kind}, {found.direction}",
                    name,
                    milliseconds(timing.best),
                    milliseconds(timing.median),
                    "" if timing is ours else ratio(ours, timing),
                    megabytes(timing.memory),
                ]
            )
            records.append(
                {
                    "task": found.task,
                    "kind": found.kind,
                    "direction": found.direction,
                    "name": name,
                    "seconds": timing.seconds,
                    "peak_bytes": timing.memory,
                }
            )
    head = ["", "", "best ms", "median ms", "ours is faster by", "peak MB, both passes"]
    return markdown(head, rows), records


def benchmark_models(args: argparse.Namespace) -> tuple[str, list[dict]]:
    from benchmarks import models  # needs detectron2, which `op` does not

    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, for peers too
    contenders = [models.ours(text, args.device) for text in args.models]
    plain = list(contenders)
    precisions = [p for p, asked in (("tf32", args.tf32), ("bfloat16", args.bf16)) if asked]
    contenders += [models.in_precision(contender, p) for p in precisions for contender in plain]
    images = models.batches(args.size, args.batch, args.device)
    eager = list(contenders)
    if args.graph:
        contenders += _those_that_work(models.captured, eager, images[0])
    if args.compile:
        contenders += _those_that_work(models.compiled, eager, images[0])
    if args.int8:
        contenders += [models.in_int8(contender, args.size) for contender in plain]
    contenders += [models.peer(text, args.device) for text in args.peer]
    names = [c.name for c in contenders]
    if len(set(names)) < len(names):
        raise SystemExit(f"two models have the same name, write NAME=CONFIG: {names}")
    rates = {}
    for precision in ("float32", *precisions):
        with models.computing_in(precision, torch.device(args.device)):
            rates[precision] = product_rate(args.device)
    models.measure(contenders, images, args.rounds, args.device)
    if args.train:
        models.measure_training(contenders, args.size, max(2, args.rounds // 2), args.device, args.batch)
    rows: list[list[object]] = [
        ["large product", precision, "", "", f"{rate / 1e9:.0f} GMAC/s", "", ""]
        for precision, rate in rates.items()
    ]
    records: list[dict] = [
        {"part": "large product", "name": precision, "multiply_adds_per_second": rate}
        for precision, rate in rates.items()
    ]
    for part in ("model", "encoder", "training step"):
        base = contenders[0].timings.get(part)
        for contender in contenders:
            timing = contender.timings.get(part)
            if timing is None:
                continue
            against = "" if timing is base or base is None else ratio(timing, base)
            macs = models.multiply_adds(contender, args.size) if part == "model" else None
            limit = None if macs is None else args.batch * macs / rates[contender.precision]  # seconds
            rows.append(
                [
                    part,
                    contender.name,
                    f"{timing.best:.4g}",
                    f"{timing.median:.4g}",
                    against,
                    "" if limit is None else f"{limit / timing.median:.0%}",
                    megabytes(timing.memory),
                ]
            )
            records.append(
                {
                    "part": part,
                    "name": contender.name,
                    "parameters": contender.parameters,
                    "multiply_adds": macs,
                    "seconds": timing.seconds,
                    "peak_bytes": timing.memory,
                }
            )
    head = ["", "", "best s", "median s", f"faster than {names[0]}", "of the limit", "peak MB"]
    return markdown(head, rows), records


def _those_that_work(make: Callable, contenders: list, *inputs: object) -> list:
    """``make`` of each; one that fails is left out and named."""
    made = []
    for contender in contenders:
        try:
            made.append(make(contender, *inputs))
        except Exception as error:
            print(f"{contender.name}: no {make.__name__} model: {type(error).__name__}: {error}", flush=True)
    return made


def main() -> None:
    args = arguments()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    table, records = (benchmark_ops if args.command == "op" else benchmark_models)(args)
    about = {**machine(args.device), "load before": f"{load:.2f}"}
    print(" · ".join(f"{k} {v}" for k, v in about.items()), "\n")
    print(table)
    if args.json:
        asked = {k: v for k, v in vars(args).items() if k != "json"}
        write_json(args.json, {"machine": about, "arguments": asked, "results": records})


if __name__ == "__main__":
    _checkout.run(main)
