"""The encoder contract, the deformable encoder layer, and the dense encoder.

All encoders are one loop, *some tokens are refreshed by attending over all tokens*; a strategy
decides which. The dense encoder (Deformable DETR, Sec. 4.1) refreshes all of them in every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .layers import FFN, TransformerLayer
from .tokens import LevelShapes, Tokens

if TYPE_CHECKING:
    from .decoder import DecoderOutput
    from .proposals import ProposalHead


@dataclass
class EncoderOutput:
    """What an encoder hands to query selection, the decoder and its own losses.

    Attributes:
        memory: (B, N, C) all tokens, refreshed or not.
        selected: (B, K) int64 tokens the encoder refreshed, best first; None if it refreshed all.
        selected_mask: (B, K) bool, True for the entries of ``selected`` that belong to the image's
            own budget; None if all do.
        scores: (B, N) the ranking behind ``selected``, or None.
        predictions: auxiliary (logits (B, K, num_classes), boxes (B, K, 4)) by the suffix of their
            losses, matched and penalised like a decoder layer's; in any order of the tokens.
        intermediate: what the strategy's own ``losses`` read, and what it shows to tools.
    """

    memory: Tensor
    selected: Tensor | None = None
    selected_mask: Tensor | None = None
    scores: Tensor | None = None
    predictions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    intermediate: Mapping[str, object] = field(default_factory=dict)


class Encoder(nn.Module):
    """What every strategy provides.

    ``needs_decoder_samples`` asks the decoder to record, in training, where it looked;
    ``needs_proposal_head`` says that ``forward`` uses the two-stage head.
    """

    needs_decoder_samples = False
    needs_proposal_head = False

    # What the loading of checkpoints (``engine``) must know about an encoder; a training model has more
    # parts than inference needs, and published files have names of their own.
    training_only: tuple[str, ...] = ()  # children that may be missing in inference
    # By family of names ("authors" or "detrex"): regular expression -> name within this encoder
    published_names: Mapping[str, Sequence[tuple[str, str]]] = {}
    published_unused: tuple[str, ...] = ()  # expressions of names that a model need not have
    published_heads = "heads"  # child, if any, whose heads are published behind those of the proposals

    def published_notes(self) -> list[str]:
        """What users must know before they load a published file: settings that it does not tell."""
        return []

    def forward(self, tokens: Tokens, proposal_head: ProposalHead | None) -> EncoderOutput:
        raise NotImplementedError

    def losses(
        self, encoded: EncoderOutput, decoded: DecoderOutput, tokens: Tokens, targets: list
    ) -> dict[str, Tensor]:
        """The strategy's own losses, already weighted."""
        return {}

    def metrics(self, encoded: EncoderOutput) -> dict[str, Tensor]:
        """Scalars worth logging, without gradient; called after ``losses``."""
        return {}


class DeformableEncoderLayer(TransformerLayer):
    """LayerNorm(x + attention), then LayerNorm(x + FFN): post-norm, Deformable DETR, Fig. 4."""

    def __init__(
        self, *, attention: nn.Module, embed_dim: int = 256, ffn_dim: int = 1024, dropout: float = 0.1
    ):
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FFN(embed_dim=embed_dim, ffn_dim=ffn_dim, dropout=dropout)

    def attend(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: LevelShapes,
        mask: Tensor | None,
    ) -> Tensor:
        """The first half of the layer."""
        attended, _ = self.attention(x + position, reference, value, shapes, mask)
        return self.norm(x + self.dropout(attended))

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: LevelShapes,
        mask: Tensor | None,
    ) -> Tensor:
        """Refresh ``x`` from ``value``.

        Args:
            x, position: (B, K, C) the tokens to refresh and their position codes.
            reference: (B, K, L, 2) their reference points.
            value: (B, N, C) all tokens; mask: (B, N) bool, True on padding, or None.

        Returns:
            (B, K, C).
        """
        return self.ffn(self.attend(x, position, reference, value, shapes, mask))


def clone_layers(layer: nn.Module, num_layers: int) -> nn.ModuleList:
    """``num_layers`` independent copies; the transformer draws their initial weights."""
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))


class DenseEncoder(Encoder):
    """Every token attends over all tokens in every layer."""

    def __init__(self, *, layer: DeformableEncoderLayer, num_layers: int = 6):
        super().__init__()
        self.layers = clone_layers(layer, num_layers)

    def forward(self, tokens: Tokens, proposal_head: ProposalHead | None = None) -> EncoderOutput:
        memory = tokens.features
        for layer in self.layers:
            memory = layer(
                memory, tokens.position, tokens.reference_points, memory, tokens.shapes, tokens.value_mask
            )
        return EncoderOutput(memory=memory)
