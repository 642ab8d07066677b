"""Key-aware deformable attention: the weights compare the query with what it samples.

Lite DETR (Li et al., CVPR 2023), Sec. 3.4 "Key-aware Deformable Attention". Plain deformable
attention predicts its weights from the query alone; here they are the softmax of scaled dot
products with the *sampled keys*, so that a low-level token can tell which of the high-level tokens
it has looked at are worth reading.
"""

from __future__ import annotations

__all__ = ["KeyAwareDeformAttn"]

from torch import Tensor, nn

from ...kernels import key_aware_deform_attn, key_aware_weights, sampling_locations
from ..attention import DeformableSampling, Samples, project_value
from ..tokens import LevelShapes


class KeyAwareDeformAttn(DeformableSampling):
    """Deformable attention with softmax(<query, sampled key> / sqrt(D)) as its weights.

    Takes the place of ``MSDeformAttn`` in encoder and decoder layers. A sample outside the map or
    on padding has key and value 0: its score is 0, not minus infinity, and it keeps its part of the
    softmax. The published models are trained with it.

    Args:
        key_projection: project keys apart from the values; by default the values are the keys.
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
        key_projection: bool = False,
    ):
        super().__init__(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            shared_offsets=shared_offsets,
        )
        self.query_proj = nn.Linear(embed_dim, embed_dim)
        self.key_proj = nn.Linear(embed_dim, embed_dim) if key_projection else None
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        for projection in (self.query_proj, self.key_proj):
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: LevelShapes,
        mask: Tensor | None = None,
        record: bool = False,
    ) -> tuple[Tensor, Samples | None]:
        """Attend from ``query`` to the maps in ``value``; arguments as in ``MSDeformAttn``.

        Returns:
            (B, Q, C) and the samples, or None unless ``record``.
        """
        locations = sampling_locations(reference, self.offsets(query), shapes)
        query = self.query_proj(query).unflatten(-1, (self.num_heads, -1))  # (B, Q, M, D)
        key = None
        if self.key_proj is not None:
            key = project_value(self.key_proj, value, mask, self.num_heads)  # (B, N, M, D)
        value = project_value(self.value_proj, value, mask, self.num_heads)  # (B, N, M, D)
        out = self.output_proj(key_aware_deform_attn(query, key, value, shapes, locations))
        if not record:
            return out, None
        weights = key_aware_weights(query, value if key is None else key, shapes, locations)
        return out, Samples(locations.detach(), weights)
