"""Multi-scale deformable attention as a layer: the projections around the op of ``kernels/``.

Deformable DETR, Sec. 4.1, Eq. (3): every head of a query samples P points on each of L levels
around the query's reference point and sums them with learned weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import ms_deform_attn, ms_deform_attn_fused, sampling_locations
from .layers import at_least_float32
from .tokens import LevelShapes


class Samples(NamedTuple):
    """Where one attention layer looked, and with which weight.

    locations: (B, Q, M, L, P, 2) in [0, 1] of the padded maps, float32 or float64.
    weights: (B, Q, M, L, P), softmax over L * P.
    """

    locations: Tensor
    weights: Tensor


def initial_offsets(num_heads: int, num_levels: int, num_points: int) -> Tensor:
    """(M * L * P * 2,) start of the offsets' bias: head m looks in direction 2 pi m / M, point p at
    p + 1 cells (in the maximum norm), the same on every level."""
    angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (M, 2)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, num_points + 1, dtype=torch.float32)
    offsets = direction[:, None, None] * steps[:, None]  # (M, 1, P, 2)
    return offsets.expand(-1, num_levels, -1, -1).flatten()


class DeformableSampling(nn.Module):
    """What every deformable attention has: projections of values and outputs, learned offsets.

    Args:
        shared_offsets: a head's P offsets, in cells, are the same on all levels.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        shared_offsets: bool = False,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"{type(self).__name__}: embed_dim={embed_dim} must be a multiple of num_heads={num_heads}"
            )
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.shared_offsets = shared_offsets
        points = num_heads * self._offset_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, points * 2)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)

    @property
    def _offset_levels(self) -> int:
        return 1 if self.shared_offsets else self.num_levels

    def init_weights(self) -> None:
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(
                initial_offsets(self.num_heads, self._offset_levels, self.num_points)
            )
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def offsets(self, query: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, M, L, P, 2), see ``sampling_locations``."""
        offsets = self.sampling_offsets(query).unflatten(
            -1, (self.num_heads, self._offset_levels, self.num_points, 2)
        )
        return offsets.expand(-1, -1, -1, self.num_levels, -1, -1)


class MSDeformAttn(DeformableSampling):
    """Multi-scale deformable attention: weights are a linear function of the query."""

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        shared_offsets: bool = False,
    ):
        super().__init__(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            shared_offsets=shared_offsets,
        )
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: LevelShapes,
        mask: Tensor | None = None,
        record: bool = False,
    ) -> tuple[Tensor, Samples | None]:
        """Attend from ``query`` to the maps in ``value``.

        Args:
            query: (B, Q, C), position already added.
            reference: (B, Q, L, 2 or 4) points or cxcywh boxes in [0, 1] of the padded maps.
            value: (B, N, C), the tokens of all levels.
            mask: (B, N) bool, True where the value is padding, or None.
            record: return the samples too (they then carry no gradient of their own).

        Returns:
            (B, Q, C) and the samples, or None unless ``record``.
        """
        value = project_value(self.value_proj, value, mask, self.num_heads)  # (B, N, M, D)
        offsets = self.offsets(query)  # (B, Q, M, L, P, 2)
        logits = self.attention_weights(query)
        logits = logits.unflatten(-1, (self.num_heads, -1))  # (B, Q, M, L * P)
        if not record:
            out = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
            return self.output_proj(out), None
        locations = sampling_locations(reference, offsets, shapes)
        weights = at_least_float32(logits).softmax(-1).view(offsets.shape[:-1])  # (B, Q, M, L, P)
        out = ms_deform_attn(value, shapes, locations, weights)
        return self.output_proj(out), Samples(locations.detach(), weights.detach())


def project_value(projection: nn.Linear, value: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
    """Project (B, N, C), zero the padding *after* the bias, split heads -> (B, N, M, D)."""
    value = projection(value)
    if mask is not None:
        value = value.masked_fill(mask[..., None], 0.0)
    return value.unflatten(-1, (num_heads, -1))
