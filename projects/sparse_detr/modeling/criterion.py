"""The set loss: classification, L1 and GIoU over every set of predictions.

DETR, Sec. 3.1, Eq. (2), with sigmoid focal classification (Deformable DETR, App. A.4). Decoder
layers, proposals, auxiliary and denoising predictions are all ``Predictions``; what differs between
them is how objects are assigned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from .boxes import cxcywh_to_xyxy, giou, iou
from .layers import at_least_float32, tensor_like
from .matcher import Assignment, HungarianMatcher, Matches, Target


@dataclass(frozen=True)
class BatchPart:
    """Gradient accumulation: losses are those of one of ``num_parts`` parts of a batch.

    Set losses are divided by the objects per part of the whole batch, ``num_objects / num_parts``,
    not by the part's own, so that the *mean* of the parts' losses is the loss of the whole batch.

    ``share`` is of the part's images, where they are computed in several groups: losses that are means
    over images, the encoders', count by it, so that the *sum* of the groups' losses is the part's.
    """

    num_objects: int
    num_parts: int = 1
    share: float = 1.0


@dataclass
class Predictions:
    """One set of predictions to penalise.

    logits: (B, Q, num_classes).
    boxes: (B, Q, 4) cxcywh in [0, 1] of the unpadded image.
    """

    logits: Tensor
    boxes: Tensor
    assignment: Assignment = field(default_factory=Assignment)


class SetCriterion(nn.Module):
    """Matches every prediction set to the objects and sums three losses.

    Args:
        weight_class, weight_bbox, weight_giou: loss weights.
        alpha, gamma: focal loss (Lin et al., Eq. (5)).
        giou_eps: see ``giou``; 0 in Deformable DETR, 1e-6 in DINO.
        iou_aware: the class score of a matched prediction learns the IoU of its box with the object
            instead of 1; see ``iou_aware_focal_loss``.
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        weight_class: float = 2.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        giou_eps: float = 0.0,
        iou_aware: bool = False,
    ):
        super().__init__()
        self.matcher = matcher
        self.weights = {"loss_class": weight_class, "loss_bbox": weight_bbox, "loss_giou": weight_giou}
        self.alpha = alpha
        self.gamma = gamma
        self.giou_eps = giou_eps
        self.iou_aware = iou_aware

    def forward(
        self, predictions: Sequence[Predictions], targets: Sequence[Target], part: BatchPart | None = None
    ) -> dict[str, Tensor]:
        """Weighted ``loss_class``, ``loss_bbox`` and ``loss_giou`` with each set's suffix.

        Args:
            part: where the images are a part of their batch only.
        """
        return {name: value * weight for name, value, weight in self.losses(predictions, targets, part)}

    def losses(
        self, predictions: Sequence[Predictions], targets: Sequence[Target], part: BatchPart | None = None
    ) -> list[tuple[str, Tensor, float]]:
        """(name, unweighted loss, weight) for every loss of every set."""
        part = part or BatchPart(sum(len(t.labels) for t in targets))
        count = self._num_boxes(part.num_objects, predictions[0].boxes)
        out = []
        for prediction, match in zip(predictions, self.match(predictions, targets)):
            how = prediction.assignment
            normalizer = (count * how.repeat).clamp(min=1) * how.normalizer / part.num_parts
            labels, boxes = _concatenate(_targets_of(how, targets))
            for name, value in self._set_losses(prediction, match, labels, boxes).items():
                out.append((name + how.suffix, value / normalizer, self.weights[name] * how.weight))
        return out

    def match(self, predictions: Sequence[Predictions], targets: Sequence[Target]) -> list[Matches]:
        """The assignment of every set, in order."""
        unmatched = [p for p in predictions if p.assignment.matches is None]
        problems = [
            (at_least_float32(p.logits.detach()), p.boxes.detach(), _targets_of(p.assignment, targets))
            for p in unmatched
        ]
        found = iter(self.matcher(problems, [f"loss_*{p.assignment.suffix}" for p in unmatched]))
        return [p.assignment.matches or next(found) for p in predictions]

    def _set_losses(
        self, prediction: Predictions, match: Matches, labels: Tensor, boxes: Tensor
    ) -> dict[str, Tensor]:
        logits = at_least_float32(prediction.logits)
        matched = prediction.boxes[match.batch, match.query]  # (T, 4)
        target = boxes[match.target].to(matched.dtype)  # (T, 4)
        corners, target_corners = cxcywh_to_xyxy(matched), cxcywh_to_xyxy(target)
        overlap = giou(corners, target_corners, self.giou_eps)
        wanted = torch.zeros_like(logits)  # (B, Q, num_classes), not 0 where matched
        quality = iou(corners, target_corners).detach().to(logits.dtype) if self.iou_aware else 1.0
        where = match.batch, match.query, labels[match.target]
        wanted[where] = quality
        if self.iou_aware:
            positive = torch.zeros_like(logits, dtype=torch.bool)
            positive[where] = True
            loss_class = iou_aware_focal_loss(logits, wanted, positive, self.alpha, self.gamma)
        else:
            loss_class = sigmoid_focal_loss(
                logits, wanted, alpha=self.alpha, gamma=self.gamma, reduction="sum"
            )
        return {
            "loss_class": loss_class,
            "loss_bbox": F.l1_loss(matched, target, reduction="sum"),
            "loss_giou": (1 - overlap).sum(),
        }

    @staticmethod
    def _num_boxes(num_objects: int, like: Tensor) -> Tensor:
        """Objects per process, averaged over all processes."""
        count = tensor_like(float(num_objects), like)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
            count = count / comm.get_world_size()
        return count


def iou_aware_focal_loss(
    logits: Tensor, quality: Tensor, positive: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Binary cross entropy with the IoU as target, weighted; VarifocalNet (Zhang et al., 2021), Eq. (2).

    Positives weigh their IoU, negatives ``(1 - alpha) * p^gamma``, both without gradient; summed.

    Args:
        logits, quality: (...) with ``quality`` in [0, 1], 0 where not ``positive`` (bool).
    """
    negative = (1 - alpha) * logits.detach().sigmoid() ** gamma
    weight = torch.where(positive, quality, negative)
    return F.binary_cross_entropy_with_logits(logits, quality, weight, reduction="sum")


def _targets_of(how: Assignment, targets: Sequence[Target]) -> list[Target]:
    """The objects as a prediction set sees them."""
    seen = list(targets)
    if how.class_agnostic:
        seen = [replace(t, labels=torch.zeros_like(t.labels)) for t in seen]
    if how.repeat > 1:
        seen = [
            replace(t, labels=t.labels.repeat(how.repeat), boxes=t.boxes.repeat(how.repeat, 1)) for t in seen
        ]
    return seen


def _concatenate(targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """(T,) labels and (T, 4) boxes of all images, in order."""
    return torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets])
