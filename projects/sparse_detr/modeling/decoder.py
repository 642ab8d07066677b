"""The deformable decoder: queries attend to each other, then to the memory, and refine their boxes.

Deformable DETR, Sec. 4.1 (decoder) and 4.2 (iterative bounding box refinement); DINO, Sec. 3.5 (look
forward twice) and DAB-DETR, Sec. 4.3 (positions coded from the current box).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attention import Samples
from .heads import DetectionHeads
from .layers import FFN, MLP, TransformerLayer, at_least_float32, box_code, clone_layers, inverse_sigmoid
from .proposals import Queries
from .tokens import Tokens


@dataclass
class DecoderOutput:
    """Predictions of the decoder layers, last layer last (only the last one in eval mode).

    logits: per layer (B, Q, num_classes).
    boxes: per layer (B, Q, 4) cxcywh in [0, 1] of the unpadded image.
    samples: per layer, where the cross attention of the detection queries looked; empty unless
        recorded.
    states: per layer (B, Q, C), what the heads read.
    references: per layer (B, Q, 2 or 4), what the cross attention looked around.
    """

    logits: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    references: list[Tensor] = field(default_factory=list)


class DeformableDecoderLayer(TransformerLayer):
    """Self-attention, deformable cross-attention and FFN, each with residual and LayerNorm."""

    def __init__(
        self,
        *,
        cross_attention: nn.Module,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(embed_dim, num_heads, dropout=dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = cross_attention
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.ffn = FFN(embed_dim=embed_dim, ffn_dim=ffn_dim, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def init_weights(self) -> None:
        nn.init.zeros_(self.self_attention.in_proj_bias)
        nn.init.zeros_(self.self_attention.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        tokens: Tokens,
        attn_mask: Tensor | None,
        record: bool,
    ) -> tuple[Tensor, Samples | None]:
        """One layer.

        Args:
            x, position: (B, Q, C) contents and position codes.
            reference: (B, Q, L, 2 or 4) in [0, 1] of the padded maps.
            attn_mask: (Q, Q) bool, True where a query (row) must not see another, or None.

        Returns:
            (B, Q, C), and the cross attention's samples if ``record``.
        """
        query = x + position
        mixed, _ = self.self_attention(query, query, x, attn_mask=attn_mask, need_weights=False)
        x = self.self_norm(x + self.dropout(mixed))
        attended, samples = self.cross_attention(
            x + position, reference, memory, tokens.shapes, tokens.value_mask, record
        )
        x = self.cross_norm(x + self.dropout(attended))
        return self.ffn(x), samples


class DeformableDecoder(nn.Module):
    """``num_layers`` decoder layers with optional box refinement between them.

    Args:
        refine: each layer's box becomes the next layer's reference, without gradient.
        look_forward_twice: a layer's loss also reaches the offset of the layer before (DINO).
        norm: heads read LayerNorm(state); the refinement keeps reading the state itself (DINO).
        position_from_reference: code the query position from the current box in every layer by a
            two-layer MLP (DAB-DETR) instead of taking it from the queries.
        sine_code: that MLP reads the box's sine code; False: its four numbers (RT-DETR).
        eps: see ``inverse_sigmoid``; 1e-5 in Deformable DETR, 1e-3 in DINO.
    """

    def __init__(
        self,
        *,
        layer: DeformableDecoderLayer,
        num_layers: int = 6,
        embed_dim: int = 256,
        refine: bool = True,
        look_forward_twice: bool = False,
        norm: bool = False,
        position_from_reference: bool = False,
        sine_code: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__()
        if look_forward_twice and not refine:
            raise ValueError("DeformableDecoder: look_forward_twice=True needs refine=True")
        self.layers = clone_layers(layer, num_layers)
        self.refine = refine
        self.look_forward_twice = look_forward_twice
        self.eps = eps
        self.norm = nn.LayerNorm(embed_dim) if norm else None
        self.num_feats = embed_dim // 2
        self.sine_code = sine_code
        sizes = (2 * embed_dim, embed_dim) if sine_code else (4, 2 * embed_dim)
        self.position_mlp = (
            MLP(input_dim=sizes[0], hidden_dim=sizes[1], output_dim=embed_dim, num_layers=2)
            if position_from_reference
            else None
        )

    def forward(
        self, queries: Queries, memory: Tensor, tokens: Tokens, heads: DetectionHeads, record: bool = False
    ) -> DecoderOutput:
        """Decode ``queries`` (B, Q, C) against ``memory`` (B, N, C).

        In training every layer predicts; in eval mode only the last one does. ``record`` keeps
        where each layer's cross attention looked.
        """
        out = DecoderOutput()
        x = queries.content
        reference = queries.reference  # (B, Q, 2 or 4), what the layer attends around
        base = reference  # the same values, with the gradient the prediction may use
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            out.references.append(reference)
            ratios = tokens.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)  # (B, L, 2 or 4)
            scaled = reference[:, :, None] * ratios[:, None]  # (B, Q, L, 2 or 4)
            position = self._position(queries, reference if tokens.exact else scaled[:, :, 0], x)
            x, samples = layer(x, position, scaled, memory, tokens, queries.attn_mask, record)
            if samples is not None:
                out.samples.append(samples)

            # Without a norm in between, the refined box is the layer's prediction.
            predicts_refined = self.norm is None and base is reference
            refined = None
            if self.refine and (predicts_refined or not last):
                refined = self._offset(heads.regress(index, x), reference)
            if self.training or last:
                state = x if self.norm is None else self.norm(x)
                out.states.append(state)
                out.logits.append(heads.classify(index, state))
                if predicts_refined and refined is not None:
                    out.boxes.append(refined)
                else:
                    out.boxes.append(self._offset(heads.regress(index, state), base))
            if refined is not None:
                reference = refined.detach()
                base = refined if self.look_forward_twice else reference
        return out

    def _position(self, queries: Queries, reference: Tensor, x: Tensor) -> Tensor:
        """(B, Q, C), where needed from the (B, Q, 2 or 4) references; published: in [0, 1] of the padded
        level 0, so that a query's code depends on its image's batch."""
        if self.position_mlp is None:
            assert queries.position is not None, "these queries need position_from_reference=True"
            return queries.position
        code = reference
        if self.sine_code:
            code = box_code(reference, self.num_feats, order=(1, 0, 2, 3))  # (B, Q, 2 * C)
        return self.position_mlp(code.to(x.dtype))

    def _offset(self, delta: Tensor, reference: Tensor) -> Tensor:
        """sigmoid(delta + logit(reference)); a point has no size, so w and h come from delta."""
        delta = at_least_float32(delta)
        logit = inverse_sigmoid(reference, self.eps)
        if reference.shape[-1] == 2:
            logit = torch.cat([logit, torch.zeros_like(logit)], dim=-1)
        return (delta + logit).sigmoid()  # (B, Q, 4)
