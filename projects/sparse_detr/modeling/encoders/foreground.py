"""Which tokens are foreground: scoring from coarse to fine, label assignment and loss.

Focus-DETR (Zheng et al., ICCV 2023), Sec. 3, "Scoring mechanism": the foreground token
selector with top-down score modulation, Eq. (1)-(3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from ..boxes import cxcywh_to_xyxy
from ..layers import at_least_float32, tensor_like
from ..selection import TokenScorer
from ..tokens import LevelShapes, Tokens

if TYPE_CHECKING:
    from ..matcher import Target

DISTANCES = ("side", "centre")


class ForegroundScorer(nn.Module):
    """One foreground logit per token; coarser levels modulate the finer ones.

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
    last = torch.tensor(x.shape[:1:-1], device=x.device).sub(1).clamp(min=1)  # (W - 1, H - 1)
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


def foreground_targets(
    boxes: Sequence[Tensor],
    shapes: LevelShapes,
    strides: Sequence[int],
    size_ranges: Sequence[Sequence[float]],
    distance: str = "side",
) -> Tensor:
    """(B, N) bool, True for tokens inside a box that their level is responsible for.

    A token sits at ``index * stride + stride // 2`` pixels. It is foreground if some box holds it
    strictly inside and its largest distance to the box lies in its level's ``(low, high]``.

    Args:
        boxes: per image (G, 4) xyxy in pixels of the network input.
        distance: to the farthest side ("side", the published code, FCOS) or, along the axis where
            it is larger, to the box centre ("centre", the paper's Eq. (2)).
    """
    # Both tests compare maxima over x and y: they factor into a row and a column part, and "any
    # box" is a product of boolean matrices instead of a (B, N, G) tensor.
    padded = pad_sequence(list(boxes), batch_first=True, padding_value=-1.0)  # (B, G, 4)
    targets = []
    for (height, width), stride, (low, high) in zip(shapes, strides, size_ranges):
        holds_x, large_x = _along(padded[..., 0::2], width, stride, low, high, distance)
        holds_y, large_y = _along(padded[..., 1::2], height, stride, low, high, distance)
        # (B, H, G) x (B, G, W): large enough along x, or along y
        count = holds_y @ (holds_x * large_x).mT + (holds_y * large_y) @ holds_x.mT
        targets.append((count > 0).flatten(1))  # (B, H_l * W_l)
    return torch.cat(targets, dim=1)


def _along(
    box: Tensor, cells: int, stride: int, low: float, high: float, distance: str
) -> tuple[Tensor, Tensor]:
    """One axis: whether each cell lies inside each (B, G, 2) interval and at most ``high`` away,
    and whether it is more than ``low`` away; (B, cells, G) of 0 and 1 each."""
    at = torch.arange(cells, dtype=box.dtype, device=box.device) * stride + stride // 2
    before, behind = at[:, None] - box[:, None, :, 0], box[:, None, :, 1] - at[:, None]
    if distance == "side":
        far = torch.maximum(before, behind)
    else:
        far = (before - behind).abs() / 2
    holds = (torch.minimum(before, behind) > 0) & (far <= high)
    return holds.to(box.dtype), (far > low).to(box.dtype)


def foreground_loss(
    logits: Tensor, targets: Tensor, mask: Tensor | None = None, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss per image, divided by its number of foreground tokens; mean over images.

    Args:
        logits: (B, N); targets: (B, N) bool.
        mask: (B, N) bool, True on tokens that are no samples, or None.
    """
    logits = at_least_float32(logits)
    loss = sigmoid_focal_loss(logits, targets.to(logits.dtype), alpha=alpha, gamma=gamma)
    if mask is not None:
        loss = loss.masked_fill(mask, 0.0)
    return (loss.sum(1) / targets.sum(1).clamp(min=1)).mean()


def pixel_boxes(targets: Sequence[Target]) -> list[Tensor]:
    """Each image's boxes (G, 4) as xyxy in pixels of the network input."""
    sizes = tensor_like([[w, h, w, h] for h, w in (t.size for t in targets)], targets[0].boxes)
    return [cxcywh_to_xyxy(target.boxes * size) for target, size in zip(targets, sizes)]
