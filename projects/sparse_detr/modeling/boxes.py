"""Box formats, IoU and generalised IoU (Rezatofighi et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layers import tensor_like

if TYPE_CHECKING:
    from .matcher import Target


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> corners, in the same unit."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> centre and size, in the same unit."""
    top_left, bottom_right = boxes.split(2, dim=-1)
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def pixel_boxes(targets: Sequence[Target]) -> list[Tensor]:
    """Each image's boxes (G, 4) as xyxy in pixels of the network input."""
    sizes = tensor_like([[w, h, w, h] for h, w in (t.size for t in targets)], targets[0].boxes)
    return [cxcywh_to_xyxy(target.boxes * size) for target, size in zip(targets, sizes)]


def intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of corner boxes, broadcast: (..., 4) and (..., 4) -> (...) each."""
    overlap = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = overlap.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return intersection, union


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of corner boxes, broadcast: (..., 4) and (..., 4) -> (...); 0 for two boxes without area."""
    intersection, union = intersection_and_union(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU of corner boxes, broadcast: (..., 4) and (..., 4) -> (...).

    ``eps`` is added to both denominators; with 0, two boxes without area give NaN.
    """
    intersection, union = intersection_and_union(a, b)
    hull = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def pairwise_giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU of all pairs: (Q, 4) and (G, 4) corners -> (Q, G)."""
    return giou(a[:, None], b[None], eps)
