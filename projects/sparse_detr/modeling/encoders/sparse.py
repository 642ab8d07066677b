"""Sparse DETR's encoder: score all tokens once, refresh the best of them in every layer.

Sparse DETR (Roh et al., ICLR 2022): a scoring network ranks the tokens, and the encoder refreshes
the top share of them, the keep ratio, while they attend over all tokens (Sec. 3.2); the ranking
learns to name the tokens that the decoder will look at (Sec. 3.3, ``dam``); auxiliary heads behind
the encoder layers help gradients through them (Sec. 3.4).
"""

from __future__ import annotations

__all__ = ["SparseEncoder"]

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import attention_map_splat
from ..encoder import DeformableEncoderLayer, Encoder, EncoderOutput, clone_layers
from ..heads import DetectionHeads
from ..layers import TokenScorer, at_least_float32
from ..proposals import proposal_logits
from ..tokens import Tokens, gather_tokens, scatter_tokens, token_budgets, visiting_order
from .dam import attention_map_target, correspondence, scoring_loss

if TYPE_CHECKING:
    from ..decoder import DecoderOutput
    from ..matcher import Target
    from ..proposals import ProposalHead

SCORINGS = ("attention_map", "objectness")


class SparseEncoder(Encoder):
    """The best tokens attend over all tokens; the others keep their input features.

    An image with V unpadded tokens refreshes ``int(keep_ratio * V) + 1`` of them, at most V. The
    batch is computed with the largest of these numbers, K; what a smaller image has beyond its own
    is computed but never written back (in training, the auxiliary heads see it, as published).

    Args:
        keep_ratio: share of the tokens to keep, in (0, 1], in training and inference. Weights do
            not depend on it: set it on a trained model, or override it in the config. None keeps
            all tokens and has no scoring network: the dense encoder with auxiliary heads.
        auxiliary_heads: in training, a class and a box head after every layer but the last.
        loss_weight: weight of ``loss_mask_prediction``.
        scoring: "attention_map" learns to rank the tokens by the decoder attention map.
            "objectness", described in the paper and not in the published code, ranks them by the
            best class score of a detection head on the encoder's input, which is matched and
            penalised like a decoder layer (losses ``*_backbone``).
        mask_padding: leave padding out of the scoring network's mean and of its loss, so that an
            image is scored the same alone and in any batch. The published code averages over it.
    """

    needs_proposal_head = True
    training_only = ("heads",)
    published_names = {"authors": ((r"^transformer\.enc_mask_predictor\.", "scorer."),)}

    def __init__(
        self,
        *,
        layer: DeformableEncoderLayer,
        num_layers: int = 6,
        keep_ratio: float | None = 0.3,
        embed_dim: int = 256,
        num_classes: int,
        auxiliary_heads: bool = True,
        loss_weight: float = 1.0,
        scoring: str = "attention_map",
        mask_padding: bool = False,
    ):
        super().__init__()
        if scoring not in SCORINGS:
            raise ValueError(f"SparseEncoder: scoring={scoring!r} is not one of {', '.join(SCORINGS)}")
        self.layers = clone_layers(layer, num_layers)
        self.scoring = scoring
        self.loss_weight = loss_weight
        self.mask_padding = mask_padding
        if keep_ratio is None:
            self.scorer = None
        elif scoring == "attention_map":
            self.scorer = TokenScorer(embed_dim=embed_dim)
        else:
            self.scorer = DetectionHeads(embed_dim=embed_dim, num_classes=num_classes, num_layers=1)
        self.heads = None
        if auxiliary_heads and num_layers > 1:
            self.heads = DetectionHeads(
                embed_dim=embed_dim, num_classes=num_classes, num_layers=num_layers - 1
            )
        self.keep_ratio = keep_ratio

    @property
    def keep_ratio(self) -> float | None:
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, value: float | None) -> None:
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"SparseEncoder: keep_ratio={value} must lie in (0, 1]; None keeps all tokens")
        if value is not None and self.scorer is None:
            raise ValueError(
                f"SparseEncoder: keep_ratio={value} needs a scoring network, and the model was "
                "built without one (keep_ratio=None); build it with a keep ratio"
            )
        self._keep_ratio = value

    @property
    def needs_decoder_samples(self) -> bool:
        return self.keep_ratio is not None and self.scoring == "attention_map"

    def forward(self, tokens: Tokens, proposal_head: ProposalHead) -> EncoderOutput:
        """Refresh the best ``tokens``.

        Returns:
            ``scores``: the logits that rank the tokens, padding at the lowest of the batch;
            ``selected``: (B, K) the chosen tokens, best first; ``intermediate["order"]``: (B, K)
            the rows of ``selected`` in the order of the auxiliary predictions.
        """
        proposals, invalid = proposal_logits(tokens)
        encoded = EncoderOutput(memory=tokens.features, intermediate={})
        x, position, reference = tokens.features, tokens.position, tokens.reference_points
        visited = keep = None
        if self.keep_ratio is not None:
            self._select(encoded, tokens, proposal_head, proposals, invalid)
            order = visiting_order(encoded.selected, tokens)  # (B, K)
            visited = encoded.selected.gather(1, order)
            encoded.intermediate["order"] = order
            x, position, reference, proposals = (
                gather_tokens(part, visited) for part in (x, position, reference, proposals)
            )  # (B, K, C), (B, K, C), (B, K, L, 2), (B, K, 4)
            keep = encoded.selected_mask.gather(1, order) if tokens.has_padding else None
        for index, layer in enumerate(self.layers):
            x = layer(x, position, reference, encoded.memory, tokens.shapes, tokens.value_mask)
            if visited is None:
                encoded.memory = x
            else:
                # The first layer copies the features; inference then updates that copy.
                encoded.memory = scatter_tokens(
                    encoded.memory,
                    visited,
                    x,
                    keep,
                    in_place=index > 0 and not torch.is_grad_enabled(),
                )
            if self.training and self.heads is not None and index < self.heads.num_layers:
                encoded.predictions[f"_enc_{index}"] = (
                    self.heads.classify(index, x),
                    _boxes(self.heads, index, x, proposals),
                )
        return encoded

    def _select(
        self,
        encoded: EncoderOutput,
        tokens: Tokens,
        proposal_head: ProposalHead,
        proposals: Tensor,
        invalid: Tensor,
    ) -> None:
        """Score all tokens and choose; fills ``scores``, ``selected`` and ``selected_mask``."""
        masked = self.mask_padding and tokens.has_padding
        # paper: scores the backbone features; published code and here: their two-stage projection.
        projected = proposal_head.project(tokens.features + tokens.position, invalid)
        if self.scoring == "attention_map":
            scores = self.scorer(projected, tokens.mask if masked else None)  # (B, N)
        else:
            logits = self.scorer.classify(0, projected)  # (B, N, num_classes)
            scores = logits.detach().amax(-1)  # (B, N)
            if self.training:
                boxes = _boxes(self.scorer, 0, projected, proposals)
                encoded.predictions["_backbone"] = logits, boxes
        if tokens.has_padding:
            # The gradient of padded tokens goes to the lowest score, as published.
            scores = torch.where(tokens.mask, scores.min(), scores)
        budgets, kept = token_budgets(tokens, self.keep_ratio)  # (B,), K
        ranking = at_least_float32(scores.detach())
        if masked:
            ranking = ranking.masked_fill(tokens.mask, float("-inf"))
        encoded.scores = scores
        encoded.selected = ranking.topk(kept, dim=1).indices  # (B, K)
        encoded.selected_mask = torch.arange(kept, device=budgets.device) < budgets[:, None]

    def losses(
        self, encoded: EncoderOutput, decoded: DecoderOutput, tokens: Tokens, targets: list[Target]
    ) -> dict[str, Tensor]:
        """``loss_mask_prediction``: the scores against the decoder attention map of this step."""
        if not self.needs_decoder_samples:
            return {}
        attention_map = attention_map_splat(
            [layer.locations for layer in decoded.samples],
            [layer.weights for layer in decoded.samples],
            tokens.shapes,
        )  # (B, N)
        target = attention_map_target(attention_map, tokens.mask, encoded.selected_mask)
        encoded.intermediate.update(
            attention_map=attention_map,
            target=target,
            correspondence=correspondence(attention_map, encoded.selected, tokens.shapes),
        )
        loss = scoring_loss(encoded.scores, target, tokens.mask if self.mask_padding else None)
        return {"loss_mask_prediction": self.loss_weight * loss}

    def metrics(self, encoded: EncoderOutput) -> dict[str, Tensor]:
        """Share of the decoder's attention on the kept tokens, of all levels and of each."""
        shares = encoded.intermediate.get("correspondence", {})
        return {f"corr_mask_attn_map_dec_{name}": share for name, share in shares.items()}


def _boxes(heads: DetectionHeads, layer: int, x: Tensor, proposals: Tensor) -> Tensor:
    """Boxes (B, K, 4) of tokens (B, K, C) around their proposals (B, K, 4) in logit space."""
    return (at_least_float32(heads.regress(layer, x)) + proposals).sigmoid()
