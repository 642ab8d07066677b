"""Kernel times beside the targets that were derived for an H200 (docs/kernels.md).

python benchmarks/gpu/targets.py [--device cuda] [--json FILE]

Forward and backward of one layer, one image of 800x1333, locations as at the start of training plus
noise of one pixel. On a GPU: replays of a CUDA graph of 20 calls that rotate four sets of inputs
(their sum exceeds L2), median of the rounds, per call. The backward of the op alone is timed, per
corner ("direct"), per block ("aggregated") and with deterministic algorithms.
"""

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import _checkout
import torch

from benchmarks import ops
from benchmarks.report import write_json
from sparse_detr.kernels import ms_deform_attn, status

CALLS, SETS = 20, 4
# Microseconds, (must, hoped for), by kind: forward float32, forward bfloat16, backward.
TARGETS = {
    "dense": ((100, 65), (65, 40), (450, 250)),
    "30 %": ((35, 25), (25, 16), (150, 95)),
    "10 %": ((16, 10), (12, 8), (75, 45)),
    "decoder 900": ((8, 6), (7, 5), (30, 22)),
    "decoder 300": ((5, 4), (5, 4), (18, 13)),
}
DETERMINISTIC = (1500, 800)  # dense


def microseconds(call, rounds: int, device: str) -> tuple[float, float, float]:
    """Median, best and worst per call; call(i) uses the i-th set of inputs."""
    for i in range(SETS):
        call(i)
    if device == "cpu":

        def run():
            begin = time.perf_counter()
            for i in range(SETS):
                call(i)
            return (time.perf_counter() - begin) / SETS
    else:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(CALLS):
                call(i % SETS)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3 / CALLS

        for _ in range(3):
            run()
    times = [run() * 1e6 for _ in range(rounds)]
    return statistics.median(times), min(times), max(times)


def verdict(time_: float, target: tuple[float, float] | None, device: str) -> str:
    if target is None or device == "cpu":
        return ""
    return "met, hoped for" if time_ <= target[1] else "met" if time_ <= target[0] else "MISSED"


def main() -> None:
    parser = _checkout.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks the maps (for a trial)")
    parser.add_argument("--kinds", nargs="+", choices=TARGETS, metavar="KIND", help="(all)")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = args.device
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    backend = status(device, load=True).backend
    if device == "cuda" and backend != "cuda":
        sys.exit(f"the CUDA operators are not in use: {status(device).reason}")
    levels = ops.scaled_levels(args.scale)
    found = []

    def record(kind, what, dtype, times, target):
        median, best, worst = times
        found.append(
            {
                "kind": kind,
                "what": what,
                "dtype": dtype,
                "microseconds": median,
                "best": best,
                "worst": worst,
                "target": target,
                "verdict": verdict(median, target, device),
            }
        )
        goal = "" if target is None else f"must {target[0]}, hoped for {target[1]}"
        print(
            f"{kind:12} {dtype:9} {what:24} {median:9.1f} us ({best:.1f}-{worst:.1f})  {goal:26}"
            f" {found[-1]['verdict']}"
        )

    for kind, (forward32, forward16, backward) in TARGETS.items():
        if args.kinds and kind not in args.kinds:
            continue
        for dtype, forward in ((torch.float32, forward32), (torch.bfloat16, forward16)):
            sets = [ops.problem(kind, levels, device, dtype, seed) for seed in range(SETS)]
            name = str(dtype).removeprefix("torch.")
            flat = [x for pair in levels for x in pair]
            inputs = [(p.value, flat, p.locations, p.weights) for p in sets]
            times = microseconds(
                lambda i, sets=sets: ms_deform_attn(
                    sets[i].value, levels, sets[i].locations, sets[i].weights
                ),
                args.rounds,
                device,
            )
            record(kind, "forward", name, times, forward)
            grads = [torch.randn_like(ms_deform_attn(p.value, levels, p.locations, p.weights)) for p in sets]

            def call(i, grads=grads, inputs=inputs):
                torch.ops.sparse_detr.ms_deform_attn_backward(grads[i], *inputs[i], [True] * 3)

            if device == "cpu":
                record(kind, "backward", name, microseconds(call, args.rounds, device), None)
                continue
            for path in ("direct", "aggregated", "auto"):
                os.environ["SPARSE_DETR_BACKWARD"] = path
                times = microseconds(call, args.rounds, device)
                record(kind, f"backward, {path}", name, times, backward if path == "auto" else None)
            if kind == "dense":
                for path in ("direct", "aggregated"):
                    os.environ["SPARSE_DETR_BACKWARD"] = path
                    torch.use_deterministic_algorithms(True)
                    times = microseconds(call, max(3, args.rounds // 5), device)
                    torch.use_deterministic_algorithms(False)
                    record(kind, f"deterministic, {path}", name, times, DETERMINISTIC)
            os.environ.pop("SPARSE_DETR_BACKWARD")
    if args.json:
        write_json(args.json, {"device": device, "backend": backend, "levels": levels, "results": found})
    missed = [x for x in found if x["verdict"] == "MISSED"]
    print(
        f"{len(found)} times, {len(missed)} targets missed"
        if device == "cuda"
        else f"{len(found)} times on the CPU: a rehearsal"
    )


if __name__ == "__main__":
    _checkout.run(main)
