"""Bipartite matching between predictions and objects.

DETR, Sec. 3.1, Eq. (1), with the focal classification cost of Deformable DETR, App. A.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .boxes import cxcywh_to_xyxy, pairwise_giou


@dataclass
class Target:
    """One image's objects.

    labels: (G,) int64, 0-based contiguous classes.
    boxes: (G, 4) cxcywh in [0, 1] of the unpadded image.
    size: (height, width) of the unpadded network input in pixels.
    """

    labels: Tensor
    boxes: Tensor
    size: tuple[int, int]


@dataclass
class Matches:
    """Matched (image, query, object) triples of one prediction set, image by image.

    batch, query: (T,) int64 indices into the predictions.
    target: (T,) int64 index into the concatenation of all images' objects.
    """

    batch: Tensor
    query: Tensor
    target: Tensor


@dataclass
class Assignment:
    """How objects are assigned to a set of predictions, and how its losses count.

    Attributes:
        suffix: appended to the loss names, e.g. ``_0`` or ``_enc``.
        class_agnostic: objects count as class 0 whatever they are.
        repeat: each object may be matched by this many predictions (H-DETR's one-to-many branch)
            and counts that often.
        matches: the assignment where it is known without matching (denoising).
        normalizer: multiplies the number of objects, at least 1, that the losses are divided by.
        weight: multiplies the set's loss weights.
    """

    suffix: str = ""
    class_agnostic: bool = False
    repeat: int = 1
    matches: Matches | None = None
    normalizer: float = 1.0
    weight: float = 1.0


class HungarianMatcher(nn.Module):
    """Minimum-cost assignment of predictions to objects, image by image.

    The cost is ``cost_class * focal + cost_bbox * L1(cxcywh) - cost_giou * GIoU``.

    Args:
        giou_eps: added to GIoU's denominators; 0 in Deformable DETR, 1e-6 in DINO.
        focal_eps: added to the probabilities under the logarithm.
    """

    def __init__(
        self,
        *,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        giou_eps: float = 0.0,
        focal_eps: float = 1e-8,
    ):
        super().__init__()
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma
        self.giou_eps = giou_eps
        self.focal_eps = focal_eps

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> list[Tensor]:
        """Per image, the (Q, G) costs of (B, Q, num_classes) logits and (B, Q, 4) boxes."""
        costs = []
        for image, target in enumerate(targets):
            wanted = target.boxes.to(boxes.dtype)  # (G, 4)
            distance = torch.cdist(boxes[image], wanted, p=1)
            overlap = pairwise_giou(cxcywh_to_xyxy(boxes[image]), cxcywh_to_xyxy(wanted), self.giou_eps)
            costs.append(
                self.cost_class * self._focal(logits[image][:, target.labels])
                + self.cost_bbox * distance
                - self.cost_giou * overlap
            )
        return costs

    def _focal(self, logits: Tensor) -> Tensor:
        """How much calling a prediction positive changes its focal loss, elementwise."""
        p = logits.sigmoid()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + self.focal_eps).log()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + self.focal_eps).log()
        return positive - negative

    @torch.no_grad()
    def forward(
        self, predictions: Sequence[tuple[Tensor, Tensor, Sequence[Target]]], names: Sequence[str]
    ) -> list[Matches]:
        """Match several prediction sets with one copy from the device.

        Args:
            predictions: (logits (B, Q, num_classes), boxes (B, Q, 4), targets) per set.
            names: of the sets, for errors.

        Raises:
            FloatingPointError: a cost is not finite; names the set and the image.
        """
        costs = [self.costs(logits, boxes, targets) for logits, boxes, targets in predictions]
        flat = [cost.flatten() for per_set in costs for cost in per_set]
        host = torch.cat(flat).cpu().split([cost.numel() for cost in flat]) if flat else ()
        host = iter(host)
        matches = []
        for number, (name, per_set) in enumerate(zip(names, costs, strict=True)):
            batch, query, target, offset = [], [], [], 0
            for image, cost in enumerate(per_set):
                matrix = next(host).view(cost.shape).numpy()
                try:
                    rows, columns = linear_sum_assignment(matrix)
                except ValueError as error:
                    raise FloatingPointError(
                        f"matching failed for the losses {name}, image {image} of the batch: "
                        f"{error}. The predictions or this image's boxes hold NaN or Inf; "
                        "lower the learning rate or check the annotations."
                    ) from error
                batch.append(torch.full((len(rows),), image))
                query.append(torch.from_numpy(rows))
                target.append(torch.from_numpy(columns) + offset)
                offset += matrix.shape[1]
            device = predictions[number][0].device
            matches.append(Matches(*(torch.cat(part).long().to(device) for part in (batch, query, target))))
        return matches
