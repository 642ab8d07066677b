"""The decoder attention map (DAM): what the decoder looked at, as a target for token scoring.

Sparse DETR (Roh et al., ICLR 2022), Sec. 3.3. The map itself, every decoder sample spread over its
four nearest tokens and summed, is ``kernels.attention_map_splat``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..elastic import KeepRatios
from ..layers import at_least_float32
from ..tokens import LevelShapes, gather_tokens


def attention_map_target(attention_map: Tensor, mask: Tensor, owned: Tensor) -> Tensor:
    """The tokens that the decoder looked at most, as many per image as the encoder keeps.

    Args:
        attention_map: (B, N).
        mask: (B, N) bool, True on padding, which ranks last.
        owned: (B, K) bool; row k is True if the image's k-th best token belongs to its budget.

    Returns:
        (B, N) of 0 and 1, dtype of ``attention_map``. Where the decoder looked at fewer tokens
        than the budget, arbitrary others fill it up.
    """
    ranking = attention_map.masked_fill(mask, -1.0)  # a sum of attention weights is never negative
    best = ranking.topk(owned.shape[1], dim=1).indices  # (B, K)
    return torch.zeros_like(attention_map).scatter_(1, best, owned.to(attention_map.dtype))


def attention_map_share(attention_map: Tensor, mask: Tensor, ratios: KeepRatios) -> Tensor:
    """Of the keep ratios, even in their logarithm, the share at which each token would be a target.

    The mean of ``attention_map_target`` over budgets: it grows with a token's rank at every budget, and
    does not depend on the one that the step has drawn.

    Args:
        attention_map: (B, N); mask: (B, N) bool, True on padding, whose share is 0.

    Returns:
        (B, N) in [0, 1], dtype of ``attention_map``.
    """
    rank = attention_map.masked_fill(mask, -1.0).argsort(dim=1, descending=True).argsort(dim=1)
    needed = rank / (~mask).sum(1, keepdim=True)  # the keep ratio from which on it is a target
    share = torch.log(ratios.highest / needed) / math.log(ratios.highest / ratios.lowest)
    return share.clamp(0.0, 1.0).masked_fill(mask, 0.0).to(attention_map.dtype)


def scoring_loss(scores: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the scores, a mean over tokens and then over images.

    Args:
        scores: (B, N) logits; target: (B, N) of 0 and 1.
        mask: (B, N) bool, True on tokens to leave out; None takes all, also padding, as published.
    """
    scores = at_least_float32(scores)
    loss = F.binary_cross_entropy_with_logits(scores, target.to(scores.dtype), reduction="none")
    if mask is None:
        return loss.mean()
    return (loss.masked_fill(mask, 0.0).sum(1) / (~mask).sum(1)).mean()


@torch.no_grad()
def correspondence(attention_map: Tensor, selected: Tensor, shapes: LevelShapes) -> dict[str, Tensor]:
    """Share of the decoder's attention that falls on the selected tokens.

    Args:
        attention_map: (B, N).
        selected: (B, K) tokens.

    Returns:
        ``all`` and, per level, ``0``, ``1``, ...: the mean over images; 0 for a level without
        attention.
    """
    kept = torch.zeros_like(attention_map)
    kept.scatter_(1, selected, gather_tokens(attention_map, selected))
    sizes = [h * w for h, w in shapes]
    kept = torch.stack([x.sum(1) for x in kept.split(sizes, dim=1)], dim=1)  # (B, L)
    total = torch.stack([x.sum(1) for x in attention_map.split(sizes, dim=1)], dim=1)  # (B, L)
    shares = {"all": kept.sum(1) / total.sum(1)}
    shares.update((str(level), share) for level, share in enumerate((kept / total).unbind(1)))
    return {name: share.nan_to_num(0.0).mean() for name, share in shares.items()}
