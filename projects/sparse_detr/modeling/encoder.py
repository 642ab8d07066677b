"""The encoder: choose tokens, refresh them by attending over all, write them back.

That loop is the same for every method and stands here once. A method says in a file of its own
(``encoders/``) which tokens each layer refreshes, what its layer does with them, and what it learns
from. The dense encoder (Deformable DETR, Sec. 4.1) refreshes all tokens in every layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .elastic import KeepRatios
from .heads import DetectionHeads
from .layers import FFN, TransformerLayer, clone_layers
from .selection import ChosenTokens, TokenRange, TokenSet
from .tokens import LevelShapes, Tokens

if TYPE_CHECKING:
    from .decoder import DecoderOutput
    from .matcher import Target
    from .proposals import ProposalHead

Steps = Iterable[tuple[nn.Module, ChosenTokens]]  # layers, each with the tokens that it refreshes


@dataclass
class EncoderOutput:
    """What an encoder hands to query selection, the decoder and its own losses.

    Attributes:
        memory: (B, N, C) all tokens, refreshed or not.
        kept: the tokens the encoder refreshed; None if it refreshed all.
        scores: (B, N) the ranking behind ``kept``, or None.
        predictions: auxiliary (logits (B, K, num_classes), boxes (B, K, 4)) by the suffix of their
            losses, matched and penalised like a decoder layer's; in the order of ``kept.index``.
        metrics: scalars worth logging, without gradient.
        intermediate: what a method's losses read, and what it shows to tools; both ``forward`` and
            ``losses`` write into it and into ``metrics``.
    """

    memory: Tensor
    kept: TokenSet | None = None
    scores: Tensor | None = None
    predictions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    intermediate: dict[str, Any] = field(default_factory=dict)

    @property
    def selected(self) -> Tensor | None:
        """(B, K) int64, the kept tokens, best first."""
        return None if self.kept is None else self.kept.ranked

    @property
    def selected_mask(self) -> Tensor:
        """(B, K) bool, True for the entries of ``selected`` that are the image's own."""
        assert self.kept is not None
        rank = torch.arange(self.kept.ranked.shape[1], device=self.kept.budgets.device)
        return rank < self.kept.budgets[:, None]


@dataclass
class LayerInput:
    """What a layer may read when it refreshes tokens.

    Attributes:
        x: (B, K, C) the tokens as they are; chosen: which they are.
        value: (B, N, C) all tokens, to attend over.
        tokens, proposal_head, encoded: as ``Encoder.steps`` gets them.
    """

    x: Tensor
    chosen: ChosenTokens
    value: Tensor
    tokens: Tokens
    proposal_head: ProposalHead | None
    encoded: EncoderOutput

    @property
    def deformable(self) -> tuple[Tensor, Tensor, Tensor, Tensor, LevelShapes, Tensor | None]:
        """The arguments of a ``DeformableEncoderLayer``."""
        chosen, tokens = self.chosen, self.tokens
        return self.x, chosen.position, chosen.reference, self.value, tokens.shapes, tokens.value_mask


class Encoder(nn.Module):
    """The loop that all encoders are; a method fills in ``steps``, and what else its paper has.

    Attributes:
        heads: auxiliary heads behind the first layers, used in training, or None.
        running_value: layers attend to the tokens as refreshed so far; False: to the encoder's input.
        needs_decoder_samples: ask the decoder to record, in training, where it looked.
        needs_proposal_head: ``steps`` or ``refresh`` uses the two-stage head.
        elastic: the keep ratios that training draws from, or None: it takes ``keep_ratio``.
    """

    keep_ratio: Any  # float, or None for all tokens; where a method has one
    running_value = True
    needs_decoder_samples = False
    needs_proposal_head = False

    # What the loading of checkpoints (``engine``) must know about an encoder; a training model has more
    # parts than inference needs, and published files have names of their own.
    training_only: tuple[str, ...] = ()  # children that may be missing in inference
    # By family of names ("authors", "detrex", "xiuqhou"): regular expression -> name within this encoder
    published_names: Mapping[str, Sequence[tuple[str, str]]] = {}
    published_reversed: tuple[str, ...] = ()  # names within this encoder, published in reverse order
    published_settings: Mapping[str, str] = {}  # expressions of names that hold a setting -> attribute
    published_unused: tuple[str, ...] = ()  # expressions of names that a model need not have
    published_heads = "heads"  # child, if any, whose heads are published behind those of the proposals

    def __init__(self):
        super().__init__()
        self.heads: DetectionHeads | None = None
        self.elastic: KeepRatios | None = None

    def forward(self, tokens: Tokens, proposal_head: ProposalHead | None = None) -> EncoderOutput:
        """Refresh ``tokens``, those that ``steps`` names, layer by layer."""
        encoded = EncoderOutput(memory=tokens.features)
        x, chosen = tokens.features, None
        for index, (layer, part) in enumerate(self.steps(tokens, proposal_head, encoded)):
            if part is not chosen:
                chosen, x = part, part.gather(encoded.memory)  # (B, K, C)
            value = encoded.memory if self.running_value else tokens.features
            x = self.refresh(layer, LayerInput(x, chosen, value, tokens, proposal_head, encoded))
            # The first write copies the features; inference then updates that copy.
            in_place = encoded.memory is not tokens.features and not torch.is_grad_enabled()
            encoded.memory = chosen.scatter(encoded.memory, x, in_place)
            if self.training and self.heads is not None and index < self.heads.num_layers:
                boxes = self.heads.refine(index, x, chosen.gather(tokens.proposals))
                encoded.predictions[f"_enc_{index}"] = self.heads.classify(index, x), boxes
        return encoded

    def steps(self, tokens: Tokens, proposal_head: ProposalHead | None, encoded: EncoderOutput) -> Steps:
        """Each layer, in order, with the tokens that it refreshes.

        Layers in a row with the same object pass the refreshed tokens on, also those beyond an
        image's own budget. A method that ranks the tokens leaves ``scores`` and ``kept`` in
        ``encoded``.
        """
        raise NotImplementedError

    def refresh(self, layer: nn.Module, given: LayerInput) -> Tensor:
        """(B, K, C), the chosen tokens after ``layer``."""
        return layer(*given.deformable)

    def published_notes(self) -> list[str]:
        """What users must know before they load a published file: settings that it does not tell."""
        return []

    def losses(
        self, encoded: EncoderOutput, decoded: DecoderOutput, tokens: Tokens, targets: list[Target]
    ) -> dict[str, Tensor]:
        """The method's own losses, already weighted."""
        return {}


class EncoderLayer(TransformerLayer):
    """The two halves of an encoder layer, ``attend`` and ``ffn``: a method's layer puts them together."""

    def __init__(
        self,
        *,
        attention: nn.Module,
        embed_dim: int = 256,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        activation: str = "relu",
    ):
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FFN(embed_dim=embed_dim, ffn_dim=ffn_dim, dropout=dropout, activation=activation)

    def attend(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: LevelShapes,
        mask: Tensor | None,
    ) -> Tensor:
        """LayerNorm(x + attention); arguments as in ``DeformableEncoderLayer``."""
        attended, _ = self.attention(x + position, reference, value, shapes, mask)
        return self.norm(x + self.dropout(attended))


class DeformableEncoderLayer(EncoderLayer):
    """LayerNorm(x + attention), then LayerNorm(x + FFN): post-norm, Deformable DETR, Fig. 4."""

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


class DenseEncoder(Encoder):
    """Every token attends over all tokens in every layer."""

    def __init__(self, *, layer: DeformableEncoderLayer, num_layers: int = 6):
        super().__init__()
        self.layers = clone_layers(layer, num_layers)

    def steps(self, tokens: Tokens, proposal_head: ProposalHead | None, encoded: EncoderOutput) -> Steps:
        everything = TokenRange(tokens)
        return [(layer, everything) for layer in self.layers]
