"""Contrastive denoising: extra decoder queries made from noised objects, in training only.

DINO, Sec. 3.3. Every group holds each object twice: a positive query whose box corners moved by
less than half a box side, to be mapped back to the object, and a negative one that moved further,
to be called background. The assignment is known, so these queries need no matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from .layers import inverse_sigmoid
from .matcher import Assignment, Matches, Target
from .proposals import Queries, QueryGroup

FLAVOURS = ("detrex", "official")


@dataclass
class Noise:
    """Random draws for R denoising queries, in the order in which they are drawn.

    label_chance: (R,) uniform in [0, 1); a label is replaced below half the label noise ratio.
    label: (R,) int64 replacement labels (they may equal the true ones).
    box_sign: (R, 4) -1 or 1, and box_part: (R, 4) uniform in [0, 1), of x1, y1, x2, y2.
    """

    label_chance: Tensor
    label: Tensor
    box_sign: Tensor
    box_part: Tensor


class ContrastiveDenoising(nn.Module):
    """Puts denoising queries in front of a detector's own.

    Args:
        num_classes: labels are drawn from these.
        num_queries: positives per image that the groups together aim at.
        label_noise_ratio: twice the share of labels that are replaced.
        box_noise_scale: 1 moves a corner by up to half the box (positives) or up to a whole one
            (negatives).
        eps: see ``inverse_sigmoid``; bounds boxes to (eps, 1 - eps) in logit space.
        flavour: "detrex" makes ``num_queries // M`` groups, M the most objects of an image, at
            least one; "official" does so from 50 queries on, takes fewer as twice as many groups
            outright, and keeps one label row more than there are classes (never drawn).
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_classes: int,
        num_queries: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        eps: float = 1e-3,
        flavour: str = "detrex",
    ):
        super().__init__()
        if flavour not in FLAVOURS:
            raise ValueError(f"ContrastiveDenoising: flavour={flavour!r} is not one of {', '.join(FLAVOURS)}")
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.eps = eps
        self.flavour = flavour
        self.label_embed = nn.Embedding(num_classes + (flavour == "official"), embed_dim)

    def num_groups(self, max_objects: int) -> int:
        """Groups for a batch whose fullest image has ``max_objects``; 0 switches denoising off."""
        if self.num_queries <= 0 or max_objects == 0:
            return 0
        if self.flavour == "official" and 2 * self.num_queries < 100:
            return 2 * self.num_queries
        return max(1, self.num_queries // max_objects)

    def draw(self, rows: int, like: Tensor) -> Noise:
        """The random numbers of ``rows`` queries, on the device and in the dtype of ``like``."""
        device = like.device
        # New labels are drawn for all rows: how many are used is only known on the device.
        return Noise(
            label_chance=torch.rand(rows, dtype=like.dtype, device=device),
            label=torch.randint(self.num_classes, (rows,), device=device),
            box_sign=torch.randint(2, (rows, 4), device=device) * 2 - 1,
            box_part=torch.rand(rows, 4, dtype=like.dtype, device=device),
        )

    def forward(self, queries: Queries, targets: Sequence[Target]) -> Queries:
        """Prepend P = 2 * G * M queries: G groups of M positives, then M negatives.

        Object k of an image is query ``(2 * g + n) * M + k`` of group g, n = 1 for the negative;
        images with fewer than M objects leave queries with content 0 and box 0.5 unused, which
        learn to be background. Without any object in the batch P is 0, and the losses and
        gradients of denoising are zero instead of missing.

        Returns:
            The queries with the group ``_dn`` in front and a (P + Q, P + Q) mask: detection
            queries do not see denoising ones, and a denoising group sees itself and them.
        """
        if queries.position is not None:
            raise ValueError(
                "denoising queries get their positions from their boxes: "
                "set model.transformer.decoder.position_from_reference=True"
            )
        labels = torch.cat([target.labels for target in targets])  # (T,)
        boxes = torch.cat([target.boxes for target in targets])  # (T, 4)
        device = boxes.device
        # Where each object goes, from Python numbers: nothing waits for the device.
        counts = torch.tensor([len(target.labels) for target in targets])
        max_objects = int(counts.max())
        image = torch.arange(len(targets)).repeat_interleave(counts)  # (T,)
        slot = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[image]  # (T,)
        image, slot = torch.stack([image, slot]).to(device, non_blocking=True)

        num_groups = self.num_groups(max_objects)
        size = 2 * num_groups * max_objects  # P
        copies = torch.arange(2 * num_groups, device=device)[:, None]  # even: positive
        image, query = image.repeat(2 * num_groups), (copies * max_objects + slot).flatten()

        noised_labels, noised_boxes = self._noise(labels, boxes, num_groups)  # (2 * G * T, ...)
        content = self.label_embed(noised_labels).to(queries.content.dtype)
        content = content.new_zeros(len(targets), size, content.shape[-1]).index_put(
            (image, query), content
        )  # (B, P, C)
        logits = inverse_sigmoid(noised_boxes, self.eps).to(queries.reference.dtype)
        logits = logits.new_zeros(len(targets), size, 4).index_put((image, query), logits)

        objects = torch.arange(len(labels), device=device).repeat(2 * num_groups)
        matches = Matches(
            *(x.view(num_groups, 2, len(labels))[:, 0].flatten() for x in (image, query, objects))
        )
        group = QueryGroup(size, Assignment("_dn", matches=matches, normalizer=max(num_groups, 1)))
        return Queries(
            content=torch.cat([content, queries.content], dim=1),
            position=None,
            reference=torch.cat([logits.sigmoid(), queries.reference], dim=1),
            groups=[group, *queries.groups],
            attn_mask=self._mask(queries, num_groups, 2 * max_objects),
        )

    def _noise(self, labels: Tensor, boxes: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """R = 2 * G * T noised copies of (T,) labels and (T, 4) boxes, copy after copy."""
        copies = 2 * num_groups
        noise = self.draw(copies * len(labels), boxes)
        flip = noise.label_chance < self.label_noise_ratio * 0.5
        labels = torch.where(flip, noise.label, labels.repeat(copies))  # (R,)
        if self.box_noise_scale <= 0:
            return labels, boxes.repeat(copies, 1)
        negative = torch.arange(copies, device=boxes.device)[:, None, None] % 2
        part = noise.box_part.view(copies, len(boxes), 4) + negative
        half = boxes[:, 2:].repeat(1, 2) / 2  # (T, 4) half the width and height, per corner
        shift = noise.box_sign.view_as(part) * part * half * self.box_noise_scale
        # A negative's corners may swap: the inverse sigmoid clamps its size, as published.
        moved = (cxcywh_to_xyxy(boxes) + shift).clamp(0, 1)  # (2 * G, T, 4)
        return labels, xyxy_to_cxcywh(moved).flatten(0, 1)

    @staticmethod
    def _mask(queries: Queries, num_groups: int, group_size: int) -> Tensor | None:
        """(P + Q, P + Q) bool, True where the query of a row must not see that of a column."""
        size, total = num_groups * group_size, queries.content.shape[1]
        if size == 0:
            return queries.attn_mask
        group = torch.arange(size + total, device=queries.content.device) // group_size
        group.clamp_(max=num_groups)  # detection queries form the last "group", seen by all
        blocked = (group[:, None] != group) & (group < num_groups)
        if queries.attn_mask is not None:
            blocked[size:, size:] |= queries.attn_mask
        return blocked
