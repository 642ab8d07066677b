"""Focus-DETR's encoder: refresh foreground tokens, fewer in every layer, in two kinds of attention.

Focus-DETR (Zheng et al., ICCV 2023), Sec. 3. "Scoring mechanism": a foreground selector
(``foreground``) ranks all tokens once, and layer i refreshes the top share of them (cascade).
"Calculation process of dual attention": before the deformable attention, the tokens that look most
like objects exchange information directly.
"""

from __future__ import annotations

__all__ = ["FocusEncoder", "FocusEncoderLayer"]

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..encoder import Encoder, EncoderLayer, EncoderOutput, Steps
from ..layers import at_least_float32, clone_layers
from ..selection import ChosenTokens, TokenSet, keep_best, share_of
from ..tokens import LevelShapes, Tokens, gather_tokens, scatter_tokens
from .foreground import (
    DISTANCES,
    ForegroundScorer,
    foreground_loss,
    foreground_targets,
    pixel_boxes,
)

if TYPE_CHECKING:
    from ..decoder import DecoderOutput
    from ..matcher import Target
    from ..proposals import ProposalHead


class FocusEncoderLayer(EncoderLayer):
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


class FocusEncoder(Encoder):
    """Foreground tokens attend over all tokens; a layer keeps a share of the one before.

    An image with V valid tokens may refresh ``n = int(keep_ratio * V) + 1`` of them, best first;
    layer i works on the first ``int(layer_ratios[i] * K)``, K the largest n of the batch, and
    writes back the image's own n. Tokens that are never chosen keep their input features.

    Args:
        keep_ratio: share of the tokens that the first layer may refresh. The released models use
            0.5; the paper's "30 %" is the mean over the layers, 0.5 * mean(layer_ratios).
        layer_ratios: share of the kept tokens that each of the ``num_layers`` layers refreshes.
        num_objects: object tokens per layer in the dual attention.
        strides: cell size of each level in pixels; size_ranges: the distances ``(low, high]`` in
            pixels that each level is responsible for, see ``foreground_targets``.
        loss_weight: weight of the foreground loss.
        distance: "side" as published, or "centre" as the paper describes.
        probabilities: rank object tokens by the product of class and foreground *probability*, as
            the paper describes. Published code multiplies the raw logits: two clearly negative
            ones make a large product.
        running_value: layers attend to the tokens as refreshed so far. Published code lets every
            layer attend to the encoder's input.
        mask_padding: leave padding out of level means, ranking, object attention and loss, and
            give each image its own budget in every layer. In the published code padding takes part
            in all of them and rows beyond a smaller image's budget may be chosen as objects, so
            that an image's result depends on its batch.
    """

    needs_proposal_head = True
    published_names = {
        "detrex": (
            (r"^transformer\.alpha$", "foreground.alpha"),
            (r"^transformer\.enc_mask_predictor\.", "foreground.scorer."),
            (r"^transformer\.encoder\.(layers\.\d+\.)attentions\.0\.attn\.", r"\1object_attention."),
            (r"^transformer\.encoder\.(layers\.\d+\.)attentions\.1\.", r"\1attention."),
            (r"^transformer\.encoder\.(layers\.\d+\.)norm2\.", r"\1object_norm."),
        )
    }
    published_unused = (r"^(transformer\.encoder\.)?enhance_MCSP",)  # the class head once more

    def __init__(
        self,
        *,
        layer: FocusEncoderLayer,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_levels: int = 4,
        keep_ratio: float = 0.5,
        layer_ratios: Sequence[float] = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2),
        num_objects: int = 300,
        strides: Sequence[int] = (8, 16, 32, 64),
        size_ranges: Sequence[Sequence[float]] = ((-1, 64), (64, 128), (128, 256), (256, 999999)),
        loss_weight: float = 1.5,
        distance: str = "side",
        probabilities: bool = False,
        running_value: bool = False,
        mask_padding: bool = False,
    ):
        super().__init__()
        for name, ratios in (("keep_ratio", [keep_ratio]), ("layer_ratios", layer_ratios)):
            if not all(0 < ratio <= 1 for ratio in ratios):
                raise ValueError(f"FocusEncoder: {name}={list(ratios)} must lie in (0, 1]")
        for name, values, count, unit in (
            ("layer_ratios", layer_ratios, num_layers, "layers"),
            ("strides", strides, num_levels, "levels"),
            ("size_ranges", size_ranges, num_levels, "levels"),
        ):
            if len(values) != count:
                raise ValueError(
                    f"FocusEncoder: {name} has {len(values)} entries for {count} {unit}: "
                    f"set model.transformer.encoder.{name}, one per {unit[:-1]}"
                )
        if distance not in DISTANCES:
            raise ValueError(f"FocusEncoder: distance={distance!r} is not one of {', '.join(DISTANCES)}")
        self.foreground = ForegroundScorer(embed_dim=embed_dim, num_levels=num_levels)
        self.layers = clone_layers(layer, num_layers)
        self.keep_ratio = keep_ratio
        self.layer_ratios = tuple(layer_ratios)
        self.num_objects = num_objects
        self.strides = tuple(strides)
        self.size_ranges = tuple(tuple(limits) for limits in size_ranges)
        self.loss_weight = loss_weight
        self.distance = distance
        self.probabilities = probabilities
        self.running_value = running_value  # read by the loop
        self.mask_padding = mask_padding

    def steps(self, tokens: Tokens, proposal_head: ProposalHead | None, encoded: EncoderOutput) -> Steps:
        """Layer i refreshes the best ``layer_ratios[i]`` of the foreground (cascade)."""
        assert proposal_head is not None
        projected = proposal_head.project(tokens.features + tokens.position, tokens.unproposed)
        mask = tokens.value_mask if self.mask_padding else None
        encoded.scores = self.foreground(projected, tokens, mask)  # (B, N)
        encoded.kept = keep_best(tokens, encoded.scores, self.keep_ratio, strict=self.mask_padding)
        budgets = encoded.kept.budgets  # (B,)
        counts = [share_of(encoded.kept.ranked.shape[1], ratio) for ratio in self.layer_ratios]
        encoded.intermediate.update(layer_counts=tuple(counts), objects=[])
        steps = []
        for layer, ratio, count in zip(self.layers, self.layer_ratios, counts):
            own = (budgets * ratio).long().clamp(min=1) if self.mask_padding else budgets
            steps.append((layer, encoded.kept.first(count, own)))
        return steps

    def refresh(
        self,
        layer: nn.Module,
        x: Tensor,
        value: Tensor,
        chosen: ChosenTokens,
        tokens: Tokens,
        proposal_head: ProposalHead | None,
        encoded: EncoderOutput,
    ) -> Tensor:
        """Object tokens exchange information first, then all attend over ``value`` (dual attention)."""
        assert isinstance(chosen, TokenSet) and proposal_head is not None
        own = chosen.own if self.mask_padding else None
        objects = self.objects(x, chosen.gather(chosen.ranking), own, proposal_head)  # (B, O)
        encoded.intermediate["objects"].append(chosen.index.gather(1, objects))
        hidden = None if own is None else ~own.gather(1, objects)
        return layer(
            x,
            chosen.position,
            chosen.reference,
            value,
            tokens.shapes,
            tokens.value_mask,
            objects=objects,
            object_mask=hidden,
        )

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
        return score.topk(torch.sym_min(self.num_objects, x.shape[1]), dim=1).indices

    def losses(
        self, encoded: EncoderOutput, decoded: DecoderOutput, tokens: Tokens, targets: list[Target]
    ) -> dict[str, Tensor]:
        """``loss_foreground``, published as ``select_loss``; a mean over this process's images."""
        assert encoded.scores is not None
        wanted = foreground_targets(
            pixel_boxes(targets), tokens.shapes, self.strides, self.size_ranges, self.distance
        )
        loss = foreground_loss(encoded.scores, wanted, tokens.mask if self.mask_padding else None)
        return {"loss_foreground": self.loss_weight * loss}
