"""Choosing tokens: scores, how many of them an image keeps, and how a layer takes them out.

What the encoders that refresh a part of the tokens share; a paper's own ranking is in its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .budgets import ImageBudgets
from .layers import at_least_float32, tensor_like
from .tokens import Tokens, gather_tokens, scatter_tokens


class TokenScorer(nn.Module):
    """One logit per token from the token and the mean of its map.

    Half of the channels stay the token's own, the other half become their mean over the map
    (the scoring network of Sparse DETR, Sec. 3.2; Focus-DETR has the same for each level).
    """

    def __init__(self, *, embed_dim: int):
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"TokenScorer: embed_dim={embed_dim} must be a multiple of 4")
        self.layer1 = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, embed_dim), nn.GELU())
        self.layer2 = nn.Sequential(
            nn.Linear(embed_dim, embed_dim // 2),
            nn.GELU(),
            nn.Linear(embed_dim // 2, embed_dim // 4),
            nn.GELU(),
            nn.Linear(embed_dim // 4, 1),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Score (B, N, C) -> (B, N).

        Args:
            mask: (B, N) bool, True on padding that the mean leaves out; None averages all tokens,
                as the published models do.
        """
        local, context = self.layer1(x).chunk(2, dim=-1)  # (B, N, C / 2) each
        if mask is None:
            mean = context.mean(1, keepdim=True)  # (B, 1, C / 2)
        else:
            total = context.masked_fill(mask[..., None], 0.0).sum(1, keepdim=True)
            mean = total / (~mask).sum(1).clamp(min=1)[:, None, None]
        x = torch.cat([local, mean.expand_as(local)], dim=-1)  # (B, N, C)
        return self.layer2(x).squeeze(-1)


class ForegroundScorer(nn.Module):
    """One foreground logit per token; coarser levels modulate the finer ones.

    Focus-DETR (Zheng et al., ICCV 2023), Sec. 3 "Scoring mechanism", Eq. (3), top-down modulation.
    Level l is scored on ``z_l * (1 + alpha * upsampled logits of level l + 1)`` with a learned
    ``alpha`` per pair of levels; all levels share one network. As that network starts with a
    LayerNorm, which undoes a positive factor but for its eps, the modulation acts mostly where the
    factor is negative; so it does in the published models.
    """

    def __init__(self, *, embed_dim: int, num_levels: int):
        super().__init__()
        self.scorer = TokenScorer(embed_dim=embed_dim)
        self.alpha = nn.Parameter(torch.empty(num_levels - 1))  # coarse to fine
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.uniform_(self.alpha, -0.3, 0.3)

    def forward(self, x: Tensor, tokens: Tokens, mask: Tensor | None = None) -> Tensor:
        """Score projected tokens (B, N, C) -> (B, N).

        Args:
            mask: (B, N) bool, True on tokens to leave out of each level's mean, or None.
        """
        levels = tokens.split_levels(x)
        masks = [None] * len(levels) if mask is None else tokens.split_levels(mask)
        scores = [self.scorer(levels[-1], masks[-1])]  # (B, H_l * W_l) each, coarse to fine
        for step, level in enumerate(reversed(range(len(levels) - 1))):
            coarse = scores[-1].unflatten(1, tokens.shapes[level + 1])[:, None]
            shape = tokens.shapes[level]
            if mask is None:  # as published: from corner to corner of the padded maps
                fine = F.interpolate(coarse, shape, mode="bilinear", align_corners=True)
            else:
                cells = tokens.valid_cells
                fine = _enlarge_valid(coarse, cells[:, level + 1], cells[:, level], shape)
            fine = fine.flatten(1)[..., None]  # (B, H_l * W_l, 1)
            modulated = levels[level] * (1 + self.alpha[step] * fine)
            scores.append(self.scorer(modulated, masks[level]))
        return torch.cat(scores[::-1], dim=1)


def _enlarge_valid(x: Tensor, cells: Tensor, new_cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bilinear resize of each image's valid part to the valid part of a larger map, corners aligned.

    Args:
        x: (B, 1, H, W); cells, new_cells: (B, 2) number (w, h) of valid cells before and after.
        shape: of the new map.

    Returns:
        (B, 1, *shape); in the padding, the last row and column.
    """
    scale = (cells - 1) / (new_cells - 1).clamp(min=1)  # (B, 2), from new cells to old ones
    last = tensor_like(x.shape[:1:-1], cells).sub(1).clamp(min=1)  # (W - 1, H - 1)
    axes = [
        torch.minimum(torch.arange(size, device=x.device) * scale[:, axis, None], cells[:, axis, None] - 1)
        / last[axis]
        * 2
        - 1
        for axis, size in enumerate(reversed(shape))
    ]  # (B, W_new), (B, H_new) in [-1, 1]
    grid = torch.stack(
        [axes[0][:, None].expand(-1, shape[0], -1), axes[1][:, :, None].expand(-1, -1, shape[1])], dim=-1
    ).to(x.dtype)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)


def padding_last(scores: Tensor, mask: Tensor | None, strict: bool) -> Tensor:
    """A ranking (B, N) from ``scores`` (B, N), without gradient, that puts padding at the end.

    Args:
        mask: (B, N) bool, True on padding; None where there is none.
        strict: behind every other token; otherwise level with the batch's lowest score, as published.
    """
    scores = at_least_float32(scores.detach())
    if mask is None:
        return scores
    return torch.where(mask, torch.finfo(scores.dtype).min if strict else scores.min(), scores)


def promise_count(item: float, limit: int, least: int = 1) -> int:
    """``item``, an int out of a tensor; tells export tracers that it lies in ``least`` to ``limit``."""
    count = cast(int, item)  # int() would fix the number, which is a symbol in an export
    if not torch.jit.is_tracing():  # there, sizes are tensors, and nothing needs the promise
        torch._check(count >= least)
        torch._check(count <= limit)
    return count


def token_budgets(tokens: Tokens, keep_ratio: float, ranking: Tensor) -> tuple[Tensor, int]:
    """How many tokens each image keeps: ``int(keep_ratio * valid) + 1`` of its ``valid`` ones.

    The product is rounded to float32, as published, and an image never keeps more than it has. With
    ``ImageBudgets`` as keep ratio it is what they say of the ``ranking`` (B, N).

    Returns:
        (B,) int64 budgets and their maximum K as a Python int, without waiting for the device
        where ``tokens.counts`` is known, if the ranking is not needed.
    """
    if isinstance(keep_ratio, ImageBudgets):
        budgets = keep_ratio.counts(ranking, ~tokens.mask)
    else:
        valid = torch.tensor(tokens.valid_counts)
        budgets = torch.minimum((valid.float() * keep_ratio).long() + 1, valid)
    kept = promise_count(budgets.max().item(), tokens.mask.shape[1])
    return budgets.to(tokens.mask.device, non_blocking=True), kept


def level_budgets(tokens: Tokens, keep_ratios: Sequence[float]) -> tuple[Tensor, list[int]]:
    """How many tokens each image keeps of each level: ``int(keep_ratio * valid)`` of its ``valid`` ones.

    The product is rounded to float32, as published; a level may keep none.

    Returns:
        (B, L) int64 budgets and, per level, the most of an image, as in ``token_budgets``.
    """
    valid = torch.tensor(tokens.level_counts)  # (B, L)
    budgets = (valid.float() * torch.tensor(keep_ratios, dtype=torch.float32)).long()
    most = [
        promise_count(count.item(), height * width, least=0)
        for count, (height, width) in zip(budgets.amax(0), tokens.shapes)
    ]
    return budgets.to(tokens.mask.device, non_blocking=True), most


def share_of(count: int, ratio: float) -> int:
    """``int(ratio * count)`` rounded to float32, as published, but at least 1."""
    return promise_count(torch.tensor(count).float().mul(ratio).long().clamp(min=1).item(), count)


class TokenRange:
    """The tokens ``start`` to ``stop`` of every image: whole levels, or all of them."""

    def __init__(self, tokens: Tokens, start: int = 0, stop: int | None = None):
        self.start, self.stop = start, stop
        self.position = self.gather(tokens.position)  # (B, K, C)
        self.reference = self.gather(tokens.reference_points)  # (B, K, L, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, K, ...)."""
        return x[:, self.start : self.stop]

    def scatter(self, x: Tensor, update: Tensor, in_place: bool = False) -> Tensor:
        """``x`` (B, N, C) with ``update`` (B, K, C) in the place of these tokens."""
        if self.start == 0 and self.stop is None:
            return update
        parts = [x[:, : self.start], update]
        return torch.cat(parts if self.stop is None else [*parts, x[:, self.stop :]], dim=1)


class TokenSet:
    """Chosen tokens, different ones in every image of a batch.

    A batch is computed with as many tokens as its largest image keeps. What a smaller image has
    beyond its own budget is computed with the others, but never written back.

    Args:
        ranked: (B, K) int64, tokens of each image, best first.
        budgets: (B,) int64, how many of them are the image's own.
        ranking: (B, N), what they were ranked by.
        varied: images without padding keep different numbers, too.

    Attributes:
        order: (B, K) int64 ranks, in the order in which the tokens are visited.
        index: (B, K) int64 tokens, in that order.
        own: (B, K) bool, True for the image's own tokens; None where all are.
        position, reference: (B, K, C) position codes and (B, K, L, 2) reference points.
    """

    def __init__(
        self, tokens: Tokens, ranked: Tensor, budgets: Tensor, ranking: Tensor, varied: bool = False
    ):
        self.tokens, self.ranked, self.budgets, self.ranking = tokens, ranked, budgets, ranking
        self.varied = varied
        self.order = visiting_order(ranked, tokens)
        self.index = ranked.gather(1, self.order)
        self.own = self.order < budgets[:, None] if tokens.has_padding or varied else None
        self.position = self.gather(tokens.position)
        self.reference = self.gather(tokens.reference_points)

    def gather(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, K, ...)."""
        return gather_tokens(x, self.index)

    def scatter(self, x: Tensor, update: Tensor, in_place: bool = False) -> Tensor:
        """``x`` (B, N, C) with ``update`` (B, K, C) in the place of each image's own tokens.

        Args:
            in_place: write into ``x`` itself; not where autograd still needs it.
        """
        return scatter_tokens(x, self.index, update, self.own, in_place=in_place)

    def first(self, count: int, budgets: Tensor) -> TokenSet:
        """The best ``count`` of them, of which ``budgets`` (B,) are the images' own."""
        return TokenSet(self.tokens, self.ranked[:, :count], budgets, self.ranking, self.varied)


ChosenTokens = TokenRange | TokenSet  # what an encoder layer may refresh


def keep_best(tokens: Tokens, scores: Tensor, keep_ratio: float, *, strict: bool = True) -> TokenSet:
    """The ``keep_ratio`` tokens of each image with the best ``scores`` (B, N).

    Args:
        keep_ratio: share of an image's tokens, or ``ImageBudgets``.
        strict: the choice does not depend on the other images of the batch: padding comes last, and
            before it the ``unproposed`` tokens, which look all the same to a scorer that reads the
            two-stage projection. False ranks both by their score, as published.
    """
    ranking = padding_last(scores, tokens.value_mask, strict)
    ordered = unproposed_last(ranking, tokens) if strict else ranking
    budgets, kept = token_budgets(tokens, keep_ratio, ordered)  # (B,), K
    varied = isinstance(keep_ratio, ImageBudgets) and ranking.shape[0] > 1
    return TokenSet(tokens, ordered.topk(kept, dim=1).indices, budgets, ranking, varied)


def keep_best_of_levels(
    tokens: Tokens, scores: Tensor, keep_ratios: Sequence[float], *, strict: bool = True
) -> TokenSet:
    """The best tokens of each level, a share ``keep_ratios`` of each, ranked over all levels.

    Args:
        scores: (B, N).
        strict: as in ``keep_best``. False ranks padding level with the lowest score of its level in the
            batch and gives an image as many tokens of each level as the batch's largest has; it refreshes
            as many as it has itself, the best of all levels.
    """
    ranking = padding_last(scores, tokens.value_mask, strict)
    budgets, counts = level_budgets(tokens, keep_ratios)  # (B, L), [K_l]
    if strict:
        ordered = tokens.split_levels(unproposed_last(ranking, tokens))  # (B, H_l * W_l) each
    else:
        masks = tokens.split_levels(tokens.mask) if tokens.has_padding else [None] * len(counts)
        ordered = [padding_last(*level, strict) for level in zip(tokens.split_levels(scores), masks)]
    chosen, values = [], []
    for level, (start, count) in enumerate(zip(tokens.level_starts, counts)):
        value, index = ordered[level].topk(count, dim=1)  # (B, K_l)
        if tokens.has_padding and strict:
            rank = torch.arange(count, device=index.device)
            value = value.masked_fill(rank >= budgets[:, level, None], torch.finfo(value.dtype).min)
        chosen.append(index + start)
        values.append(value)
    value = torch.cat(values, dim=1)  # (B, K)
    ranked = torch.cat(chosen, dim=1).gather(1, value.topk(value.shape[1], dim=1).indices)
    return TokenSet(tokens, ranked, budgets.sum(1), ranking)


def unproposed_last(ranking: Tensor, tokens: Tokens) -> Tensor:
    """``ranking`` (B, N) with ``unproposed`` tokens behind the others, by place, and before padding."""
    size = ranking.shape[1]
    # All different, so that no tie is decided by the rounding of equal scores.
    place = torch.arange(size, dtype=ranking.dtype, device=ranking.device) / size
    last = torch.finfo(ranking.dtype).min / 2 * (1 + place)
    return torch.where(tokens.unproposed & ~tokens.mask, last, ranking)


def visiting_order(ranked: Tensor, tokens: Tokens) -> Tensor:
    """An order of chosen tokens in which neighbours in the image follow each other.

    Neighbours sample the same values, which are then still in the cache; best first, they are
    scattered (docs/kernels.md, "The order of kept tokens"). Tokens go by the cells of a 16x16 grid
    over the image, the tokens of all levels together.

    Args:
        ranked: (B, K) int64, different tokens of each image.

    Returns:
        (B, K) int64 rows of ``ranked``.
    """
    place = gather_tokens(tokens.reference_points[:, :, 0], ranked)  # (B, K, 2)
    column_of_grid, row_of_grid = (place * 16).long().unbind(-1)  # past 16 in the padding
    key = row_of_grid * 1024 + column_of_grid
    key = key * tokens.mask.shape[1] + ranked  # all different: the same order on every device
    return key.argsort(dim=1)
