"""The set loss: classification, L1 and GIoU over every set of predictions.

DETR, Sec. 3.1, Eq. (2), with sigmoid focal classification (Deformable DETR, App. A.4). Decoder
layers, proposals, auxiliary and denoising predictions are all ``Predictions``; what differs between
them is how objects are assigned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from .boxes import cxcywh_to_xyxy, giou
from .layers import at_least_float32, tensor_like
from .matcher import HungarianMatcher, Matches, Target

# (objects of this process's whole batch, number of parts) while a part of a batch is computed
_part: tuple[int, int] | None = None


@contextmanager
def part_of_batch(num_objects: int, num_parts: int) -> Iterator[None]:
    """Gradient accumulation: losses inside are those of one of ``num_parts`` parts of a batch.

    Set losses are divided by the objects per part of the whole batch, ``num_objects / num_parts``,
    not by the part's own, so that the *mean* of the parts' losses is the loss of the whole batch.
    """
    global _part
    before, _part = _part, (num_objects, num_parts)
    try:
        yield
    finally:
        _part = before


@dataclass
class Predictions:
    """One set of predictions to penalise.

    Attributes:
        logits: (B, Q, num_classes).
        boxes: (B, Q, 4) cxcywh in [0, 1] of the unpadded image.
        suffix: appended to the loss names, e.g. ``_0`` or ``_enc``.
        class_agnostic: objects count as class 0 whatever they are.
        repeat: each object may be matched by this many predictions (H-DETR's one-to-many branch)
            and counts that often.
        matches: the assignment where it is known without matching (denoising).
        normalizer: multiplies the number of objects, at least 1, that the losses are divided by.
        weight: multiplies this set's loss weights.
    """

    logits: Tensor
    boxes: Tensor
    suffix: str = ""
    class_agnostic: bool = False
    repeat: int = 1
    matches: Matches | None = None
    normalizer: float = 1.0
    weight: float = 1.0


class SetCriterion(nn.Module):
    """Matches every prediction set to the objects and sums three losses.

    Args:
        weight_class, weight_bbox, weight_giou: loss weights.
        alpha, gamma: focal loss (Lin et al., Eq. (5)).
        giou_eps: see ``giou``; 0 in Deformable DETR, 1e-6 in DINO.
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
    ):
        super().__init__()
        self.matcher = matcher
        self.weights = {"loss_class": weight_class, "loss_bbox": weight_bbox, "loss_giou": weight_giou}
        self.alpha = alpha
        self.gamma = gamma
        self.giou_eps = giou_eps

    def forward(self, predictions: Sequence[Predictions], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Weighted ``loss_class``, ``loss_bbox`` and ``loss_giou`` with each set's suffix."""
        losses = {}
        for name, value, weight in self.losses(predictions, targets):
            losses[name] = value * weight
        return losses

    def losses(
        self, predictions: Sequence[Predictions], targets: Sequence[Target]
    ) -> list[tuple[str, Tensor, float]]:
        """(name, unweighted loss, weight) for every loss of every set."""
        matches = self.match(predictions, targets)
        num_objects = sum(len(t.labels) for t in targets)
        num_objects, num_parts = _part or (num_objects, 1)
        count = self._num_boxes(num_objects, predictions[0].boxes)
        out = []
        for prediction, match in zip(predictions, matches):
            labels, boxes = _concatenate(_targets_of(prediction, targets))
            for name, value in self._set_losses(prediction, match, labels, boxes).items():
                out.append(
                    (
                        name + prediction.suffix,
                        value
                        / ((count * prediction.repeat).clamp(min=1) * prediction.normalizer)
                        * num_parts,
                        self.weights[name] * prediction.weight,
                    )
                )
        return out

    def match(self, predictions: Sequence[Predictions], targets: Sequence[Target]) -> list[Matches]:
        """The assignment of every set, in order."""
        unmatched = [p for p in predictions if p.matches is None]
        found = iter(
            self.matcher(
                [
                    (at_least_float32(p.logits.detach()), p.boxes.detach(), _targets_of(p, targets))
                    for p in unmatched
                ],
                [f"loss_*{p.suffix}" for p in unmatched],
            )
        )
        return [next(found) if p.matches is None else p.matches for p in predictions]

    def _set_losses(
        self, prediction: Predictions, match: Matches, labels: Tensor, boxes: Tensor
    ) -> dict[str, Tensor]:
        logits = at_least_float32(prediction.logits)
        wanted = torch.zeros_like(logits)  # (B, Q, num_classes), one-hot where matched
        wanted[match.batch, match.query, labels[match.target]] = 1.0
        matched = prediction.boxes[match.batch, match.query]  # (T, 4)
        target = boxes[match.target].to(matched.dtype)  # (T, 4)
        overlap = giou(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(target), self.giou_eps)
        return {
            "loss_class": sigmoid_focal_loss(
                logits, wanted, alpha=self.alpha, gamma=self.gamma, reduction="sum"
            ),
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


def _targets_of(prediction: Predictions, targets: Sequence[Target]) -> list[Target]:
    """The objects as this prediction set sees them."""
    seen = list(targets)
    if prediction.class_agnostic:
        seen = [replace(t, labels=torch.zeros_like(t.labels)) for t in seen]
    if prediction.repeat > 1:
        seen = [
            replace(t, labels=t.labels.repeat(prediction.repeat), boxes=t.boxes.repeat(prediction.repeat, 1))
            for t in seen
        ]
    return seen


def _concatenate(targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """(T,) labels and (T, 4) boxes of all images, in order."""
    return torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets])
