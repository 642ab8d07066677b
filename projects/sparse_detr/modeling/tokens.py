"""Feature maps as one token sequence: layout, masks, reference points, gather and scatter.

Tokens are the cells of all feature levels, finest level first and row-major inside a level.
This is the only place that knows the layout; everything else works on ``(B, N, C)``.

Conventions: masks are ``True`` on padding; images are padded at the right and the bottom only;
points are ``(x, y)`` in [0, 1]; level sizes are tuples of Python ints ``((H_0, W_0), ...)``.
Source: Deformable DETR, Sec. 4.1 and App. A.4 (multi-scale feature maps, reference points).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import level_sizes

LevelShapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tokens:
    """The encoder's input: ``N = sum(H_l * W_l)`` tokens of ``L`` levels.

    Attributes:
        features: (B, N, C) projected backbone features.
        position: (B, N, C) sine encoding of the cell plus the level embedding.
        mask: (B, N) bool, True on padding.
        shapes: (H, W) of each level.
        valid_ratios: (B, L, 2) fraction (w, h) of each map that shows the image.
        reference_points: (B, N, L, 2) centre of each token's cell, seen from every level, in
            [0, 1] of the padded map (cells in the padding may exceed 1).
        has_padding: False when no image of the batch is padded, known without looking at ``mask``.
        counts: unpadded tokens of each image, where that is known without waiting for the device.
    """

    features: Tensor
    position: Tensor
    mask: Tensor
    shapes: LevelShapes
    valid_ratios: Tensor
    reference_points: Tensor
    has_padding: bool
    counts: tuple[int, ...] | None = None

    @property
    def value_mask(self) -> Tensor | None:
        """The mask for attention values, or None where there is nothing to mask."""
        return self.mask if self.has_padding else None

    @property
    def valid_counts(self) -> tuple[int, ...]:
        """Unpadded tokens of each image, as Python ints."""
        return (~self.mask).sum(1).tolist() if self.counts is None else self.counts

    @property
    def level_starts(self) -> tuple[int, ...]:
        return level_starts(self.shapes)

    def split_levels(self, x: Tensor) -> list[Tensor]:
        """(B, N, ...) -> one (B, H_l * W_l, ...) per level."""
        return list(x.split([h * w for h, w in self.shapes], dim=1))


def level_starts(shapes: LevelShapes) -> tuple[int, ...]:
    """Index of the first token of each level."""
    starts = [0]
    for height, width in shapes[:-1]:
        starts.append(starts[-1] + height * width)
    return tuple(starts)


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C, H_l, W_l) or (B, H_l, W_l) -> tokens (B, N, C) or (B, N)."""
    if maps[0].dim() == 3:
        return torch.cat([m.flatten(1) for m in maps], dim=1)
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)


def valid_sizes(masks: Sequence[Tensor]) -> Tensor:
    """(B, L, 2) number (w, h) of cells that show the image, from the first row and column."""
    return torch.stack(
        [torch.stack([(~m[:, 0, :]).sum(1), (~m[:, :, 0]).sum(1)], dim=-1) for m in masks], dim=1
    )


def cell_centres(shapes: LevelShapes, like: Tensor) -> list[Tensor]:
    """Per level, the (H_l * W_l, 2) centres ``(j + 0.5, i + 0.5)`` in cells, on ``like``'s device."""
    centres = []
    for height, width in shapes:
        y, x = torch.meshgrid(
            torch.arange(height, dtype=like.dtype, device=like.device) + 0.5,
            torch.arange(width, dtype=like.dtype, device=like.device) + 0.5,
            indexing="ij",
        )
        centres.append(torch.stack([x.flatten(), y.flatten()], dim=-1))
    return centres


def encoder_reference_points(shapes: LevelShapes, valid_ratios: Tensor) -> Tensor:
    """Where each token looks first: its own cell, on every level.

    Args:
        valid_ratios: (B, L, 2) as (w, h).

    Returns:
        (B, N, L, 2): the centre in [0, 1] of the image, times each target level's valid ratio.
    """
    sizes = valid_ratios * level_sizes(shapes, valid_ratios)  # (B, L, 2)
    points = [
        centres / sizes[:, None, level]  # (B, H_l * W_l, 2)
        for level, centres in enumerate(cell_centres(shapes, valid_ratios))
    ]
    return torch.cat(points, dim=1)[:, :, None] * valid_ratios[:, None]  # (B, N, L, 2)


def promise_count(count: int, limit: int) -> None:
    """Tells export tracers that ``1 <= count <= limit``, where ``count`` came out of a tensor."""
    if not torch.jit.is_tracing():  # there, sizes are tensors, and nothing needs the promise
        torch._check(count >= 1)
        torch._check(count <= limit)


def token_budgets(tokens: Tokens, keep_ratio: float) -> tuple[Tensor, int]:
    """How many tokens each image keeps: ``int(keep_ratio * valid) + 1`` of its ``valid`` ones.

    The product is rounded to float32, as published, and an image never keeps more than it has.

    Returns:
        (B,) int64 budgets and their maximum K as a Python int, without waiting for the device
        where ``tokens.counts`` is known.
    """
    valid = torch.tensor(tokens.valid_counts)
    budgets = torch.minimum((valid.float() * keep_ratio).long() + 1, valid)
    kept = budgets.max().item()
    promise_count(kept, tokens.mask.shape[1])
    return budgets.to(tokens.mask.device, non_blocking=True), kept


def visiting_order(ranked: Tensor, tokens: Tokens, prefixes: Sequence[int] = ()) -> Tensor:
    """An order of chosen tokens in which neighbours in the image follow each other.

    Neighbours sample the same values, which are then still in the cache; best first, they are
    scattered (docs/kernels.md, "The order of kept tokens"). Tokens go by the cells of a 16x16 grid
    over the image, the tokens of all levels together.

    Args:
        ranked: (B, K) int64, different tokens of each image.
        prefixes: numbers k; the first k in the order are the first k of ``ranked``.

    Returns:
        (B, K) int64 rows of ``ranked``.
    """
    row = torch.arange(ranked.shape[1], device=ranked.device)
    place = gather_tokens(tokens.reference_points[:, :, 0], ranked)  # (B, K, 2)
    column_of_grid, row_of_grid = (place * 16).long().unbind(-1)  # past 16 in the padding
    key = row_of_grid * 1024 + column_of_grid
    for prefix in prefixes:
        key = key + (row >= prefix) * 1024**2
    key = key * tokens.mask.shape[1] + ranked  # all different: the same order on every device
    return key.argsort(dim=1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, k]]``: (B, N, ...) and (B, K) int64 -> (B, K, ...)."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    return x[batch, index]


def scatter_tokens(
    x: Tensor, index: Tensor, update: Tensor, keep: Tensor | None = None, in_place: bool = False
) -> Tensor:
    """A copy of ``x`` (B, N, C) with ``update`` (B, K, C) written at ``index`` (B, K).

    Args:
        keep: (B, K) bool; rows that are False are not written. ``index`` must not repeat a token
            among the rows that are written.
        in_place: write into ``x`` itself; not where autograd still needs it.
    """
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    update = update.to(x.dtype)
    if keep is not None:
        # Rows that are not kept write back what is there: one scatter, no per-image loop.
        update = torch.where(keep[..., None], update, x[batch, index])
    return (x.index_put_ if in_place else x.index_put)((batch, index), update)
