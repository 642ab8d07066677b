"""Time and memory of contenders that take turns.

Machines drift: clocks, caches and neighbours change from second to second. So every round runs each
contender once, in a new order, and contenders are compared by the median of the rounds' ratios.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

MIN_SECONDS = 0.02  # one measurement repeats a call until it takes at least this long


@dataclass
class Timing:
    """Seconds per call in each round; ``memory``: bytes at the peak of one call, above its start."""

    seconds: list[float] = field(default_factory=list)
    memory: int | None = None

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: Timing) -> tuple[float, float, float]:
        """``other`` takes so many times as long: median over rounds, and its quartiles."""
        ratios = [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high


def take_turns(
    contenders: dict[str, Callable[[int], object]], rounds: int, device: str, label: str = ""
) -> dict[str, Timing]:
    """Time every contender once per round.

    Args:
        contenders: called with a running number, by which they rotate their inputs.
        label: shown on the terminal while it runs.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    calls, timings = {}, {name: Timing() for name in contenders}
    for name, call in contenders.items():
        call(0)  # builds, compiles, fills caches
        once = clock(call, 1, 1)
        calls[name] = max(1, min(1000, round(MIN_SECONDS / max(once, 1e-7))))
    names, order = list(contenders), random.Random(0)
    for number in range(rounds):
        _progress(f"{label} {number + 1}/{rounds}")
        order.shuffle(names)
        for name in names:
            seconds = clock(contenders[name], number, calls[name])
            timings[name].seconds.append(seconds)
    _progress("")
    return timings


def _cpu_seconds(call: Callable[[int], object], start: int, count: int) -> float:
    begin = time.perf_counter()
    for number in range(start, start + count):
        call(number)
    return (time.perf_counter() - begin) / count


def _cuda_seconds(call: Callable[[int], object], start: int, count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for number in range(start, start + count):
        call(number)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def product_rate(device: str) -> float:
    """Multiply-adds per second of a large matrix product: what no model exceeds. Under autocast, in its
    precision."""
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = take_turns({"product": lambda _: a @ b}, 5, device)["product"]
    return size**3 / timing.best


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Most bytes of tensors that are alive at once during a call, above those alive before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    alive = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
