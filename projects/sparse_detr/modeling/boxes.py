"""Box formats and generalised IoU (Rezatofighi et al., CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> corners, in the same unit."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> centre and size, in the same unit."""
    top_left, bottom_right = boxes.split(2, dim=-1)
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU of corner boxes, broadcast: (..., 4) and (..., 4) -> (...).

    ``eps`` is added to both denominators; with 0, two boxes without area give NaN.
    """
    overlap = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0)
    hull = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).clamp(min=0)
    intersection, hull = overlap.prod(-1), hull.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def pairwise_giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU of all pairs: (Q, 4) and (G, 4) corners -> (Q, G)."""
    return giou(a[:, None], b[None], eps)
