"""Feature maps as one token sequence: layout, masks, reference points, gather and scatter.

Tokens are the cells of all feature levels, finest level first and row-major inside a level.
This is the only place that knows the layout; everything else works on ``(B, N, C)``.

Conventions: masks are ``True`` on padding; images are padded at the right and the bottom only;
points are ``(x, y)`` in [0, 1]; level sizes are tuples of Python ints ``((H_0, W_0), ...)``.
Source: Deformable DETR, Sec. 4.1 and App. A.4 (multi-scale feature maps, reference points).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import level_sizes

LevelShapes = tuple[tuple[int, int], ...]

BASE_SIZE = 0.05  # side of level 0's proposals, relative to the image; doubles per level
BORDER = 0.01  # proposals must lie in (BORDER, 1 - BORDER) in all four coordinates


class Tokens:
    """The encoder's input: ``N = sum(H_l * W_l)`` tokens of ``L`` levels.

    Args:
        features: (B, N, C) projected backbone features.
        position: (B, N, C) sine encoding of the cell plus the level embedding.
        mask: (B, N) bool, True on padding.
        shapes: (H, W) of each level.
        extents: (B, L, 2) size (w, h) of the image in cells of each level. Everything geometric
            follows from it: the published models count whole cells, ``exact_extents`` divides the
            image's pixels by the level's stride (docs/reference_points.md).
        has_padding: False when no image of the batch is padded, known without looking at ``mask``.
        counts: unpadded tokens of each image and level, where known without waiting for the device.
        exact: ``extents`` are not rounded, and nothing geometric depends on the padded size.
        padded_size: (height, width) in pixels that the maps cover, see ``pixels``.

    Attributes:
        valid_ratios: (B, L, 2) fraction (w, h) of each map that shows the image.
        centres: (B, N, 2) centre of each token's cell in [0, 1] of the image; in the padding beyond 1.
        reference_points: (B, N, L, 2) where each token looks first: its own centre, in [0, 1] of each
            padded map.
        proposals: (B, N, 4) each token's box before any head, cxcywh in logit space: its centre and
            ``0.05 * 2^l`` as width and height; +inf for ``unproposed`` tokens.
        unproposed: (B, N) bool, True on padding and where a coordinate of the box leaves (0.01, 0.99).
    """

    def __init__(
        self,
        features: Tensor,
        position: Tensor,
        mask: Tensor,
        shapes: LevelShapes,
        extents: Tensor,
        has_padding: bool,
        counts: tuple[tuple[int, ...], ...] | None = None,
        exact: bool = False,
        padded_size: tuple[int, int] | None = None,
    ):
        self.features, self.position, self.mask = features, position, mask
        self.shapes, self.extents = shapes, extents
        self.has_padding, self.counts, self.exact = has_padding, counts, exact
        self.padded_size = padded_size

        self.valid_ratios = extents / level_sizes(shapes, extents)
        levels = enumerate(cell_centres(shapes, extents))
        self.centres = torch.cat([centres / extents[:, None, level] for level, centres in levels], dim=1)
        self.reference_points = self.centres[:, :, None] * self.valid_ratios[:, None]

        sizes = [extents.new_full((h * w, 2), BASE_SIZE * 2**level) for level, (h, w) in enumerate(shapes)]
        box = torch.cat([self.centres, torch.cat(sizes).expand_as(self.centres)], dim=-1)  # (B, N, 4)
        self.unproposed = ~((box > BORDER) & (box < 1 - BORDER)).all(-1) | mask
        self.proposals = torch.log(box / (1 - box)).masked_fill(self.unproposed[..., None], float("inf"))

    @property
    def valid_cells(self) -> Tensor:
        """(B, L, 2) number (w, h) of cells that show the image."""
        levels = zip(self.split_levels(self.mask), self.shapes)
        return valid_sizes([mask.unflatten(1, shape) for mask, shape in levels])

    @property
    def value_mask(self) -> Tensor | None:
        """The mask for attention values, or None where there is nothing to mask."""
        return self.mask if self.has_padding else None

    @property
    def valid_counts(self) -> tuple[int, ...]:
        """Unpadded tokens of each image, as Python ints."""
        return tuple(map(sum, self.level_counts))

    @property
    def level_counts(self) -> tuple[tuple[int, ...], ...]:
        """Unpadded tokens of each image, level by level, as Python ints."""
        return count_valid(self.split_levels(self.mask)) if self.counts is None else self.counts

    @property
    def level_starts(self) -> tuple[int, ...]:
        return level_starts(self.shapes)

    def pixels(self, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(B or 1, N, 2) centres of the cells in pixels of the network input.

        A cell's side is the padded size over the number of cells, as published; the level's stride where
        sizes are exact.

        Args:
            image_sizes: (height, width) of each image; the largest count as padded size where
                ``padded_size`` is None.
        """
        sizes = self.centres.new_tensor([[width, height] for height, width in image_sizes])  # (B, 2)
        if self.exact:
            return self.centres * sizes[:, None]
        height, width = self.padded_size or sizes.amax(0).flip(0).tolist()
        centres = zip(cell_centres(self.shapes, sizes), self.shapes)
        return torch.cat([c * c.new_tensor([width / w, height / h]) for c, (h, w) in centres])[None]

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


def count_valid(masks: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Per image the unpadded cells of each level, from masks (B, ...)."""
    return tuple(map(tuple, torch.stack([(~mask).flatten(1).sum(1) for mask in masks], dim=1).tolist()))


def valid_sizes(masks: Sequence[Tensor]) -> Tensor:
    """(B, L, 2) number (w, h) of cells that show the image, from the first row and column."""
    return torch.stack(
        [torch.stack([(~m[:, 0, :]).sum(1), (~m[:, :, 0]).sum(1)], dim=-1) for m in masks], dim=1
    )


def exact_extents(image_sizes: Sequence[tuple[int, int]], strides: Sequence[int], like: Tensor) -> Tensor:
    """(B, L, 2) size (w, h) in cells of images given as (height, width) in pixels; not rounded."""
    sizes = torch.tensor([[w, h] for h, w in image_sizes], dtype=like.dtype)[:, None]  # (B, 1, 2)
    sizes = sizes / torch.tensor(strides, dtype=like.dtype)[:, None]
    return sizes.to(like.device, non_blocking=True)


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
