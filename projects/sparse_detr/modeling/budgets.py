"""Keep ratios that hold on average: an image's scores say how many tokens it keeps.

An image with three objects needs fewer tokens than a crowd. ``keep_best`` takes such a rule wherever it
takes a keep ratio, so every encoder that chooses by it has them (docs/elastic.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ImageBudgets(float):
    """A keep ratio that holds on average: ``counts`` says how many tokens each image keeps.

    A number all the same, the mean, wherever one is asked for.
    """

    def counts(self, ranking: Tensor, valid: Tensor) -> Tensor:
        """(B,) int64, from a ranking (B, N) and the tokens (B, N) bool that are no padding; at least 1."""
        raise NotImplementedError


class MeanRatio(ImageBudgets):
    """An image keeps the tokens that score above a threshold, between bounds.

    Where it has few such tokens it keeps few: an easy image costs less, a crowd more. The threshold makes
    ``mean`` the share of the tokens of all images together; ``calibrate`` finds it on images of the kind.
    An image's number does not depend on the images beside it where its scores do not.

    Args:
        mean: share of the tokens that is kept on average, in (0, 1].
        threshold: of the scores, as the encoder's scoring network gives them.
        low, high: an image of V tokens keeps at least ``low * V`` and at most ``high * V``; None: half and
            twice the mean.
    """

    def __new__(cls, mean: float, threshold: float, low: float | None = None, high: float | None = None):
        return super().__new__(cls, mean)

    def __init__(self, mean: float, threshold: float, low: float | None = None, high: float | None = None):
        self.threshold = threshold
        self.low = mean / 2 if low is None else low
        self.high = min(2 * mean, 1.0) if high is None else high
        if not 0 <= self.low <= mean <= self.high <= 1 or not mean:
            raise ValueError(
                f"MeanRatio: mean={mean} must lie in (0, 1], between low={self.low} and high={self.high}"
            )

    def __getnewargs__(self):  # copies and pickles are made of these
        return float(self), self.threshold, self.low, self.high

    def __repr__(self) -> str:
        return f"MeanRatio{self.__getnewargs__()}"

    def counts(self, ranking: Tensor, valid: Tensor) -> Tensor:
        total = valid.sum(1).to(ranking.dtype)
        above = ((ranking > self.threshold) & valid).sum(1)
        most, least = (total * self.high).long(), (total * self.low).long()
        return torch.maximum(torch.minimum(above, most), least).clamp(min=1)

    @classmethod
    def calibrate(
        cls, rankings: Sequence[Tensor], mean: float, low: float | None = None, high: float | None = None
    ) -> MeanRatio:
        """The threshold with which these images keep ``mean`` of their tokens, all together.

        Args:
            rankings: (V,) of each image's tokens, see ``TokenRankings``.
        """
        images = [(r[None], torch.ones_like(r[None], dtype=torch.bool)) for r in rankings]
        target = mean * sum(len(r) for r in rankings)
        # Between two scores the number does not change.
        candidates = torch.cat(list(rankings)).unique()
        first, last = 0, len(candidates) - 1
        while first < last:  # the lowest that keeps no more than the target
            middle = (first + last) // 2
            rule = cls(mean, float(candidates[middle]), low, high)
            if sum(int(rule.counts(*image)) for image in images) > target:
                first = middle + 1
            else:
                last = middle
        # Half way to the next, so that no rounding of a score decides.
        return cls(mean, float(candidates[first : first + 2].mean()), low, high)


class TokenRankings(ImageBudgets):
    """Notes the rankings that an encoder chooses by, to calibrate on; it keeps one token.

    Attributes:
        rankings: (V,) float32 of each image that was seen, without padding.
    """

    def __new__(cls):
        return super().__new__(cls, 1.0)

    def __init__(self):
        self.rankings: list[Tensor] = []

    def counts(self, ranking: Tensor, valid: Tensor) -> Tensor:
        self.rankings += [row[mask].cpu() for row, mask in zip(ranking, valid)]
        return torch.ones_like(valid[:, 0], dtype=torch.int64)
