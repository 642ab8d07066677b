"""Elastic training: one model for every keep ratio (docs/elastic.md).

The weights of a token-sparse encoder do not depend on its keep ratio, but trained at one ratio they
serve that ratio. Here the images of a training batch get different ones: half of them the highest,
the others ratios from the whole range, as in the sandwich rule of universally slimmable networks (Yu
and Huang, ICCV 2019). All pass through the backbone together. The first part of a training takes the
middle ratio alone: less time and better models than the other order, largest first, as in Once-for-All
(Cai et al., ICLR 2020); measured in docs/elastic.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill [0, 1) evenly


@dataclass
class KeepRatios:
    """The keep ratios ``lowest`` to ``highest`` that a model is trained for, even in their logarithm.

    Attributes:
        warming_up: all images take the middle of the range; set by the trainer.
    """

    lowest: float
    highest: float
    warming_up: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.lowest < self.highest <= 1:
            raise ValueError(
                f"elastic=[{self.lowest}, {self.highest}] must be the lowest and the highest keep ratio "
                "to train for, in (0, 1]"
            )

    def quantile(self, share: float) -> float:
        """The ratio below which ``share`` of the range lies."""
        return self.lowest * (self.highest / self.lowest) ** share

    def groups(self, batch_size: int, step: int) -> Iterator[tuple[float, slice]]:
        """The keep ratio of each part of a batch, a function of ``step`` alone: the same in all processes
        and in a resumed run.

        Half of the images, in turn the larger and the smaller half, take the highest ratio; one ratio
        from each half of the range goes to the others.
        """
        if self.warming_up:
            yield self.quantile(0.5), slice(0, batch_size)
            return
        full = (batch_size + step % 2) // 2
        if full:
            yield self.highest, slice(0, full)
        rest = batch_size - full
        parts = min(rest, 2)
        shift = step * _GOLDEN % 1
        for part in range(parts):
            start, stop = (full + rest * edge // parts for edge in (part, part + 1))
            yield self.quantile((part + shift) / parts), slice(start, stop)
