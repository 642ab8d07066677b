"""Which tokens are foreground: label assignment and loss.

Focus-DETR (Zheng et al., ICCV 2023), Sec. 3, "Scoring mechanism": Eq. (1) and (2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from ..layers import at_least_float32
from ..tokens import LevelShapes

DISTANCES = ("side", "centre")


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
