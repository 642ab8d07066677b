"""Salience DETR's encoder: foreground tokens of every level, ranked by how central they are.

Salience DETR (Hou et al., CVPR 2024), "hierarchical salience filtering refinement", on Focus-DETR's
cascade and dual attention (``cascade``): the selector learns a soft target, the distance to the centre
of the box, without a box for every scale (salience supervision); each level keeps a share of its own
tokens, each layer a share of those (hierarchical filtering); and tokens that the last layer does not
refresh get a learned embedding of their place (background embedding). What the paper has beside its
encoder are parts that any model may have: ``fusion``, ``first_of_neighbours``, ``iou_aware``.
"""

from __future__ import annotations

__all__ = ["SalienceEncoder"]

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..boxes import pixel_boxes
from ..cascade import CascadeEncoder, DualAttentionLayer
from ..encoder import EncoderOutput
from ..layers import at_least_float32
from ..selection import TokenSet, keep_best_of_levels
from ..tokens import LevelShapes, Tokens, gather_tokens, scatter_tokens

if TYPE_CHECKING:
    from ..decoder import DecoderOutput
    from ..matcher import Target
    from ..proposals import ProposalHead


class BackgroundEmbedding(nn.Module):
    """A vector for each place of a map: one half from its column, the other from its row.

    Args:
        size: rows and columns that have an entry of their own; those beyond share the last one (the
            published code fails there).
    """

    def __init__(self, *, embed_dim: int, size: int):
        super().__init__()
        if embed_dim % 2:
            raise ValueError(f"BackgroundEmbedding: embed_dim={embed_dim} must be even")
        self.size = size
        self.row_embed = nn.Embedding(size, embed_dim // 2)
        self.col_embed = nn.Embedding(size, embed_dim // 2)

    def init_weights(self) -> None:
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, shapes: LevelShapes) -> Tensor:
        """(N, C) for the tokens of all levels, which share the entries."""
        device = self.row_embed.weight.device
        levels = []
        for height, width in shapes:
            row = self.row_embed(torch.arange(height, device=device).clamp(max=self.size - 1))
            column = self.col_embed(torch.arange(width, device=device).clamp(max=self.size - 1))
            code = [column.expand(height, -1, -1), row[:, None].expand(-1, width, -1)]
            levels.append(torch.cat(code, dim=-1).flatten(0, 1))
        return torch.cat(levels)


class SalienceEncoder(CascadeEncoder):
    """Of each level its best tokens attend over all tokens; a layer keeps a share of the one before.

    An image with V valid tokens on level l may refresh ``int(level_ratios[l] * V)`` of them, the tokens of
    all levels ranked together. Other arguments as in ``CascadeEncoder``.

    Args:
        level_ratios: share of each level's tokens that the first layer may refresh.
        num_places: see ``BackgroundEmbedding``.
        size_ranges: see ``salience_targets``.
        target_noise: share of noise in the targets; 0 in all published configurations.
        mask_padding: see ``CascadeEncoder``; also, padding is never kept. In the published code it may
            be, where an image has fewer tokens of a level than the largest.
    """

    published_names = {
        "xiuqhou": (
            (r"^transformer\.alpha$", "foreground.alpha"),
            (r"^transformer\.enc_mask_predictor\.", "foreground.scorer."),
            (r"^transformer\.encoder\.(layers\.\d+\.)pre_attention\.", r"\1object_attention."),
            (r"^transformer\.encoder\.(layers\.\d+\.)pre_norm\.", r"\1object_norm."),
            (r"^transformer\.encoder\.background_embedding\.", "background."),
        )
    }
    published_reversed = ("foreground.alpha",)  # published finest level first
    published_unused = (r"^transformer\.encoder\.enhance_mcsp\.",)  # the class head once more
    published_settings = {
        r"^transformer\.level_filter_ratio$": "level_ratios",
        r"^transformer\.layer_filter_ratio$": "layer_ratios",
    }

    def __init__(
        self,
        *,
        layer: DualAttentionLayer,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_levels: int = 4,
        level_ratios: Sequence[float] = (0.4, 0.8, 1.0, 1.0),
        layer_ratios: Sequence[float] = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2),
        num_objects: int = 300,
        num_places: int = 200,
        size_ranges: Sequence[Sequence[float]] = ((-1, 64), (64, 128), (128, 256), (256, 99999)),
        loss_weight: float = 2.0,
        target_noise: float = 0.0,
        probabilities: bool = False,
        running_value: bool = False,
        mask_padding: bool = False,
    ):
        super().__init__(
            layer=layer,
            num_layers=num_layers,
            embed_dim=embed_dim,
            num_levels=num_levels,
            layer_ratios=layer_ratios,
            num_objects=num_objects,
            size_ranges=size_ranges,
            loss_weight=loss_weight,
            probabilities=probabilities,
            running_value=running_value,
            mask_padding=mask_padding,
        )
        self._check_shares(level_ratios=level_ratios)
        self._check_length("levels", num_levels, level_ratios=level_ratios)
        self.background = BackgroundEmbedding(embed_dim=embed_dim, size=num_places)
        self.level_ratios = tuple(level_ratios)
        self.target_noise = target_noise

    def init_weights(self) -> None:
        for module in self.foreground.scorer.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def keep(self, tokens: Tokens, scores: Tensor) -> TokenSet:
        """The best ``level_ratios`` of each level."""
        return keep_best_of_levels(tokens, scores, self.level_ratios, strict=self.mask_padding)

    def forward(self, tokens: Tokens, proposal_head: ProposalHead | None = None) -> EncoderOutput:
        """The cascade, then the background embedding of the tokens that its last layer left alone."""
        encoded = super().forward(tokens, proposal_head)
        assert encoded.kept is not None
        refreshed = encoded.kept.ranked[:, : encoded.intermediate["layer_counts"][-1]]
        own = None
        if self.mask_padding and tokens.has_padding:
            budgets = (encoded.kept.budgets * self.layer_ratios[-1]).long().clamp(min=1)
            own = torch.arange(refreshed.shape[1], device=refreshed.device) < budgets[:, None]
        place = self.background(tokens.shapes).to(encoded.memory.dtype)
        place = place.masked_fill(tokens.mask[..., None], 0.0)  # (B, N, C)
        kept = torch.zeros_like(gather_tokens(place, refreshed))
        encoded.memory = encoded.memory + scatter_tokens(place, refreshed, kept, own)
        return encoded

    def losses(
        self, encoded: EncoderOutput, decoded: DecoderOutput, tokens: Tokens, targets: list[Target]
    ) -> dict[str, Tensor]:
        """``loss_salience``, over this process's images together."""
        assert encoded.scores is not None
        pixels = tokens.pixels([target.size for target in targets])
        wanted = salience_targets(pixel_boxes(targets), pixels, tokens.shapes, self.size_ranges)
        if self.target_noise:
            wanted = torch.lerp(wanted, torch.rand_like(wanted), self.target_noise)
        encoded.intermediate["target"] = wanted
        mask = tokens.mask if self.mask_padding else None
        loss = salience_loss(encoded.scores, wanted, mask, threshold=self.target_noise / 2)
        return {"loss_salience": self.loss_weight * loss}


def salience_targets(
    boxes: Sequence[Tensor], pixels: Tensor, shapes: LevelShapes, size_ranges: Sequence[Sequence[float]]
) -> Tensor:
    """(B, N) in [0, 1]: how central a token is in a box, 1 at the centre, 0.29 at a corner, 0 outside.

    A token is salient if it lies strictly inside a box whose farthest side is within its level's
    ``(low, high]``. Its value is then the largest in any box that holds it, also of other levels.

    Args:
        boxes: per image (G, 4) xyxy in pixels of the network input.
        pixels: (B or 1, N, 2) centres of the tokens.
    """
    levels = zip(shapes, size_ranges)
    limits = torch.cat([pixels.new_tensor(limits).expand(h * w, 2) for (h, w), limits in levels])  # (N, 2)
    targets = []
    for box, centre in zip(boxes, pixels.expand(len(boxes), -1, -1)):
        before = centre[:, None] - box[:, :2]  # (N, G, 2), to the left and upper side
        behind = box[:, 2:] - centre[:, None]
        inside = torch.minimum(before, behind).amin(-1) > 0  # (N, G)
        far = torch.maximum(before, behind).amax(-1)
        fits = inside & (far > limits[:, :1]) & (far <= limits[:, 1:])
        offset = (before - behind) / (before + behind)
        central = torch.where(inside, 1 - offset.square().sum(-1).sqrt() / 2, 0.0)
        best = F.pad(central, (0, 1)).amax(-1)  # 0 also where there is no box
        targets.append(torch.where(fits.any(-1), best, 0.0))
    return torch.stack(targets)


def salience_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float = 0.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Focal loss with soft targets, divided by the number of salient tokens of all images, at least 1.

    Args:
        logits, targets: (B, N); targets above ``threshold`` count as salient.
        mask: (B, N) bool, True on tokens that are no samples, or None.
    """
    logits = at_least_float32(logits)
    targets = targets.to(logits.dtype)
    p = logits.sigmoid()
    weight = (1 - alpha) * p**gamma * (1 - targets) + alpha * (1 - p) ** gamma * targets
    loss = weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if mask is not None:
        loss = loss.masked_fill(mask, 0.0)
    return loss.sum() / (targets > threshold).sum().clamp(min=1)
