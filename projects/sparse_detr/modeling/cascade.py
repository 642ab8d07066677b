"""Encoders that refresh the foreground, fewer tokens in every layer, in two kinds of attention.

Focus-DETR (Zheng et al., ICCV 2023), Sec. 3, brought in both and others build on them. "Scoring
mechanism": a foreground selector ranks all tokens once, and layer i refreshes the top share of them
(cascade). "Calculation process of dual attention": before the deformable attention, the tokens that
look most like objects exchange information directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .encoder import Encoder, EncoderLayer, EncoderOutput, LayerInput, Steps
from .layers import at_least_float32, clone_layers
from .selection import ForegroundScorer, TokenSet, share_of
from .tokens import LevelShapes, Tokens, gather_tokens, scatter_tokens

if TYPE_CHECKING:
    from .proposals import ProposalHead


class DualAttentionLayer(EncoderLayer):
    """Self-attention among object tokens, then the deformable layer for all of its tokens."""

    def __init__(
        self,
        *,
        attention: nn.Module,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
    ):
        super().__init__(attention=attention, embed_dim=embed_dim, ffn_dim=ffn_dim, dropout=dropout)
        self.object_attention = nn.MultiheadAttention(embed_dim, num_heads, dropout=dropout, batch_first=True)
        self.object_norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: LevelShapes,
        mask: Tensor | None,
        objects: Tensor,
        object_mask: Tensor | None = None,
    ) -> Tensor:
        """Refresh ``x`` (B, K, C); arguments as in ``DeformableEncoderLayer``.

        Args:
            objects: (B, O) int64, the rows of ``x`` that attend to each other first.
            object_mask: (B, O) bool, True for those that the others must not see, or None.
        """
        chosen = gather_tokens(x, objects)  # (B, O, C)
        query = chosen + gather_tokens(position, objects)
        mixed, _ = self.object_attention(
            query, query, chosen, key_padding_mask=object_mask, need_weights=False
        )
        chosen = self.object_norm(chosen + self.dropout(mixed))
        x = scatter_tokens(x, objects, chosen)
        return self.ffn(self.attend(x, position, reference, value, shapes, mask))


class CascadeEncoder(Encoder):
    """Foreground tokens attend over all tokens; a layer keeps a share of the one before.

    A method says in ``keep`` which of the scored tokens are the foreground. With K of them in the image
    that has the most, layer i works on each image's first ``int(layer_ratios[i] * K)``, and writes back
    those that are the image's own. Tokens that are never chosen keep their input features.

    Args:
        layer_ratios: share of the kept tokens that each of the ``num_layers`` layers refreshes.
        num_objects: object tokens per layer in the dual attention.
        size_ranges: the distances ``(low, high]`` in pixels that each level is responsible for in the
            method's label assignment.
        loss_weight: weight of the foreground's loss.
        probabilities: rank object tokens by the product of class and foreground *probability*, as
            Focus-DETR's paper describes. Published code multiplies the raw logits: two clearly negative
            ones make a large product.
        running_value: layers attend to the tokens as refreshed so far. Published code lets every
            layer attend to the encoder's input.
        mask_padding: leave padding out of level means, ranking, object attention and loss, and
            give each image its own budget in every layer. In the published code padding takes part
            in all of them and rows beyond a smaller image's budget may be chosen as objects, so
            that an image's result depends on its batch.
    """

    needs_proposal_head = True

    def __init__(
        self,
        *,
        layer: DualAttentionLayer,
        num_layers: int,
        embed_dim: int,
        num_levels: int,
        layer_ratios: Sequence[float],
        num_objects: int,
        size_ranges: Sequence[Sequence[float]],
        loss_weight: float,
        probabilities: bool,
        running_value: bool,
        mask_padding: bool,
    ):
        super().__init__()
        self._check_shares(layer_ratios=layer_ratios)
        self._check_length("layers", num_layers, layer_ratios=layer_ratios)
        self._check_length("levels", num_levels, size_ranges=size_ranges)
        self.foreground = ForegroundScorer(embed_dim=embed_dim, num_levels=num_levels)
        self.layers = clone_layers(layer, num_layers)
        self.layer_ratios = tuple(layer_ratios)
        self.num_objects = num_objects
        self.size_ranges = tuple(tuple(limits) for limits in size_ranges)
        self.loss_weight = loss_weight
        self.probabilities = probabilities
        self.running_value = running_value  # read by the loop
        self.mask_padding = mask_padding

    def _check_shares(self, **settings: Sequence[float]) -> None:
        for name, ratios in settings.items():
            if not all(0 < ratio <= 1 for ratio in ratios):
                raise ValueError(f"{type(self).__name__}: {name}={list(ratios)} must lie in (0, 1]")

    def _check_length(self, unit: str, count: int, **settings: Sequence) -> None:
        for name, values in settings.items():
            if len(values) != count:
                raise ValueError(
                    f"{type(self).__name__}: {name} has {len(values)} entries for {count} {unit}: "
                    f"set model.transformer.encoder.{name}, one per {unit[:-1]}"
                )

    def keep(self, tokens: Tokens, scores: Tensor) -> TokenSet:
        """The tokens that the first layer may refresh, chosen by ``scores`` (B, N)."""
        raise NotImplementedError

    def steps(self, tokens: Tokens, proposal_head: ProposalHead | None, encoded: EncoderOutput) -> Steps:
        """Layer i refreshes the best ``layer_ratios[i]`` of the foreground (cascade)."""
        assert proposal_head is not None
        projected = proposal_head.project(tokens.features + tokens.position, tokens.unproposed)
        mask = tokens.value_mask if self.mask_padding else None
        encoded.scores = self.foreground(projected, tokens, mask)  # (B, N)
        encoded.kept = self.keep(tokens, encoded.scores)
        budgets, apart = encoded.kept.budgets, self._apart(encoded.kept)  # (B,)
        counts = [share_of(encoded.kept.ranked.shape[1], ratio) for ratio in self.layer_ratios]
        encoded.intermediate.update(layer_counts=tuple(counts), objects=[])
        steps = []
        for layer, ratio, count in zip(self.layers, self.layer_ratios, counts):
            own = (budgets * ratio).long().clamp(min=1) if apart else budgets
            steps.append((layer, encoded.kept.first(count, own)))
        return steps

    def refresh(self, layer: nn.Module, given: LayerInput) -> Tensor:
        """Object tokens exchange information first, then all attend over the value (dual attention)."""
        chosen = given.chosen
        assert isinstance(chosen, TokenSet) and given.proposal_head is not None
        own = chosen.own if self._apart(chosen) else None
        objects = self.objects(given.x, chosen.gather(chosen.ranking), own, given.proposal_head)  # (B, O)
        given.encoded.intermediate["objects"].append(chosen.index.gather(1, objects))
        hidden = None if own is None else ~own.gather(1, objects)
        return layer(*given.deformable, objects=objects, object_mask=hidden)

    def _apart(self, kept: TokenSet) -> bool:
        """Whether each image has its own number of tokens in every layer, and sees no others of them."""
        return self.mask_padding or kept.varied

    @torch.no_grad()
    def objects(
        self, x: Tensor, foreground: Tensor, own: Tensor | None, proposal_head: ProposalHead
    ) -> Tensor:
        """(B, O) rows of ``x`` (B, K, C) with the best class and foreground scores, best first."""
        category = at_least_float32(proposal_head.score(proposal_head.class_head(x)))  # (B, K)
        if self.probabilities:
            category, foreground = category.sigmoid(), foreground.sigmoid()
        score = category * foreground
        if own is not None:
            score = score.masked_fill(~own, float("-inf"))
        # While torch.jit traces, sizes are tensors, which sym_min refuses.
        size = int(x.shape[1]) if torch.jit.is_tracing() else x.shape[1]
        return score.topk(torch.sym_min(self.num_objects, size), dim=1).indices
