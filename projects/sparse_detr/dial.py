"""Cost as a dial: the keep ratio with which a call takes the time that it may take, on this machine.

The time of a call is nearly linear in the keep ratio: a constant for backbone and decoder, and as much
for every token that the encoder refreshes. So a few passes at a few ratios, taken in turns, give a line
for a size of image; the ratio is read off it, and passes at that ratio verify it.

What users ask for is kept by most calls, not by half of them, so the 95th percentile is aimed at. It
follows from the line by a factor, the percentile of (measured / expected) over recent calls. Machines
drift, by their clocks and by what else runs on them: where the percentile has left the target by more
than ``TOLERANCE``, the factor is taken anew from the recent calls and with it the ratio. In between the
ratio stays, so that an image gets the same answer twice.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from .keep_ratio import USUAL_RANGE

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ROUNDS = 3  # passes at each of the ratios that are measured, and at the one that was read off
SIZE_STEP = 1.1  # batches whose numbers of pixels differ by less share a line
PERCENTILE = 95
RECENT = 60  # calls that the percentile is taken over,
PATIENCE = 20  # once that many have been seen since it was last looked at
TOLERANCE = 0.05  # of the target


@dataclass
class Line:
    """Seconds of a call by keep ratio, for batches of about ``pixels``: ``base + slope * ratio``.

    Attributes:
        lowest, highest: keep ratios of the fastest and the slowest setting.
        ratio: the one in use.
        factor: what the percentile of calls takes, over what the line says.
        recent: measured over expected time of the last calls.
        waiting: calls to come before ``factor`` may change again.
    """

    pixels: int
    base: float
    slope: float
    lowest: float
    highest: float
    ratio: float = field(init=False)
    factor: float = 1.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    waiting: int = PATIENCE

    def __post_init__(self) -> None:
        self.ratio = self.highest

    @classmethod
    def fit(cls, pixels: int, passes: list[tuple[float, float]]) -> Line:
        """From (keep ratio, seconds) of single passes, which span the range: least squares of the medians."""
        ratios = sorted({ratio for ratio, _ in passes})
        medians = [float(np.median([s for r, s in passes if r == ratio])) for ratio in ratios]
        slope, base = np.polyfit(ratios, medians, 1)
        # On a busy machine more tokens may seem to take less time, or no token less than none.
        base, slope = max(float(base), min(medians) / 10), max(float(slope), 1e-9)
        line = cls(pixels, base, slope, lowest=ratios[0], highest=ratios[-1])
        for ratio, seconds in passes:
            line.note(ratio, seconds, pixels)
        return line

    def expected(self, ratio: float, pixels: int) -> float:
        """Seconds of the median call."""
        return (self.base + self.slope * ratio) * pixels / self.pixels

    def note(self, ratio: float, seconds: float, pixels: int) -> None:
        """A call has taken ``seconds``."""
        self.recent.append(seconds / self.expected(ratio, pixels))
        self.waiting -= 1

    def aim(self, target: float) -> None:
        """Sets ``ratio`` so that the percentile of calls takes ``target`` seconds, as near as it can."""
        self.factor = float(np.percentile(self.recent, PERCENTILE))
        self.waiting = PATIENCE
        ratio = (target / self.factor - self.base) / self.slope
        self.ratio = min(max(round(ratio, 3), self.lowest), self.highest)

    def has_left(self, target: float) -> bool:
        """Whether recent calls say that another ratio is nearer to ``target``."""
        if self.waiting > 0:
            return False
        factor = float(np.percentile(self.recent, PERCENTILE))
        miss = factor * self.expected(self.ratio, self.pixels) / target - 1
        limit = self.highest if miss < 0 else self.lowest
        return abs(miss) > TOLERANCE and self.ratio != limit

    def limits(self) -> tuple[float, float]:
        """Seconds of the percentile of calls at the fastest and the slowest setting."""
        fastest, slowest = (
            self.factor * self.expected(ratio, self.pixels) for ratio in (self.lowest, self.highest)
        )
        return fastest, slowest


class Dial:
    """Runs a detector at the keep ratio that meets a latency.

    Args:
        latency_ms: milliseconds that 95 of 100 calls may take.
        clock: seconds, of work that is done: on a GPU it waits for the device.
        device: what the log calls the machine.
        ratios: the lowest and the highest keep ratio that it may set.
    """

    def __init__(
        self,
        latency_ms: float,
        clock: Callable[[], float] = time.perf_counter,
        device: str = "machine",
        ratios: tuple[float, float] = USUAL_RANGE,
    ):
        self.latency_ms = latency_ms
        self.clock = clock
        self.device = device
        lowest, self.highest = ratios
        # Measured for the line: the ends, and one below the middle, .3 of the usual range.
        self.probes = lowest, round(lowest + 0.263 * (self.highest - lowest), 3), self.highest
        self.lines: dict[tuple[int, int], Line] = {}

    def __call__(
        self, shape: tuple[int, int, int], run: Callable[[float], Result], start: float | None = None
    ) -> Result:
        """``run(keep_ratio)``; before that, for a size not seen so far, the passes that measure it.

        Args:
            shape: images of the batch, and their height and width with padding, in pixels.
            start: the clock when the call began that this is a part of: what happened since counts.
        """
        images, height, width = shape
        pixels = images * height * width
        before = 0.0 if start is None else self.clock() - start
        target = self.latency_ms / 1e3
        key = images, round(math.log(pixels, SIZE_STEP))
        if key not in self.lines:
            self.lines[key] = self._measure(shape, run, before)
        line = self.lines[key]
        if line.has_left(target):
            line.aim(target)
            logger.debug("latency_ms=%g: keep_ratio=%g from here on", self.latency_ms, line.ratio)
        begin = self.clock()
        result = run(line.ratio)
        line.note(line.ratio, before + self.clock() - begin, pixels)
        return result

    def _measure(self, shape: tuple[int, int, int], run: Callable[[float], object], before: float) -> Line:
        pixels = math.prod(shape)
        target = self.latency_ms / 1e3

        def seconds(ratio: float) -> float:
            begin = self.clock()
            run(ratio)
            return before + self.clock() - begin

        run(self.highest)  # builds, compiles, asks for memory
        passes = []
        for number in range(ROUNDS):  # in turns, so that a drift does not tilt the line
            order = self.probes if number % 2 else self.probes[::-1]
            passes += [(ratio, seconds(ratio)) for ratio in order]
        line = Line.fit(pixels, passes)
        line.aim(target)
        verified = [line.ratio] * ROUNDS
        for ratio in verified:
            line.note(ratio, seconds(ratio), pixels)
        line.aim(target)
        self._tell(shape, line, len(passes) + len(verified))
        return line

    def _tell(self, shape: tuple[int, int, int], line: Line, passes: int) -> None:
        """One line: what is possible, and what is used."""
        fastest, slowest = line.limits()
        possible = fastest <= self.latency_ms / 1e3 <= slowest
        images, height, width = shape
        logger.log(
            logging.INFO if possible else logging.WARNING,
            f"latency_ms={self.latency_ms:g}{'' if possible else ' cannot be met, the nearest is used'}: "
            f"{images} image{'s' * (images > 1)} of {height}x{width} (height x width): "
            f"{1e3 * fastest:.3g} to {1e3 * slowest:.3g} ms on this {self.device} at keep ratios "
            f"{line.lowest:g} to {line.highest:g} ({PERCENTILE} % of calls, {passes} measured); "
            f"keep_ratio={line.ratio:g}",
        )
