"""Sparse DETR's encoder: score all tokens once, refresh the best of them in every layer.

Sparse DETR (Roh et al., ICLR 2022): a scoring network ranks the tokens, and the encoder refreshes
the top share of them, the keep ratio, while they attend over all tokens (Sec. 3.2); the ranking
learns to name the tokens that the decoder will look at (Sec. 3.3, ``dam``); auxiliary heads behind
the encoder layers help gradients through them (Sec. 3.4).
"""

from __future__ import annotations

__all__ = ["SparseEncoder"]

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import attention_map_splat
from ..elastic import KeepRatios
from ..encoder import DeformableEncoderLayer, Encoder, EncoderOutput, Steps
from ..heads import DetectionHeads
from ..layers import clone_layers
from ..selection import ChosenTokens, TokenRange, TokenScorer, keep_best
from ..tokens import Tokens
from .dam import attention_map_share, attention_map_target, correspondence, scoring_loss

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
        elastic: (lowest, highest) keep ratio that training draws from, for a model that serves any of
            them; None trains at ``keep_ratio``.
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
        elastic: Sequence[float] | None = None,
    ):
        super().__init__()
        if scoring not in SCORINGS:
            raise ValueError(f"SparseEncoder: scoring={scoring!r} is not one of {', '.join(SCORINGS)}")
        if elastic is not None and keep_ratio is None:
            raise ValueError(
                f"SparseEncoder: elastic={list(elastic)} needs a scoring network: set keep_ratio to what "
                "inference shall use, such as 0.3"
            )
        self.elastic = None if elastic is None else KeepRatios(*elastic)
        self.layers = clone_layers(layer, num_layers)
        self.scoring = scoring
        self.loss_weight = loss_weight
        self.mask_padding = mask_padding
        if keep_ratio is None:
            self.scorer: TokenScorer | DetectionHeads | None = None
        elif scoring == "attention_map":
            self.scorer = TokenScorer(embed_dim=embed_dim)
        else:
            self.scorer = DetectionHeads(embed_dim=embed_dim, num_classes=num_classes, num_layers=1)
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
        self.needs_decoder_samples = value is not None and self.scoring == "attention_map"

    def steps(self, tokens: Tokens, proposal_head: ProposalHead | None, encoded: EncoderOutput) -> Steps:
        """All layers refresh the same tokens: the best ``keep_ratio`` of each image."""
        chosen: ChosenTokens = TokenRange(tokens)
        if self.keep_ratio is not None:
            assert proposal_head is not None
            encoded.scores = self.score(tokens, proposal_head, encoded)  # (B, N)
            encoded.kept = keep_best(tokens, encoded.scores, self.keep_ratio, strict=self.mask_padding)
            chosen = encoded.kept
        return [(layer, chosen) for layer in self.layers]

    def score(self, tokens: Tokens, proposal_head: ProposalHead, encoded: EncoderOutput) -> Tensor:
        """(B, N) logits that rank the tokens, padding at the lowest of the batch (Sec. 3.2)."""
        # paper: scores the backbone features; published code and here: their two-stage projection.
        projected = proposal_head.project(tokens.features + tokens.position, tokens.unproposed)
        if isinstance(self.scorer, TokenScorer):
            scores = self.scorer(projected, tokens.value_mask if self.mask_padding else None)
        else:
            assert self.scorer is not None
            logits = self.scorer.classify(0, projected)  # (B, N, num_classes)
            scores = logits.detach().amax(-1)
            if self.training:
                boxes = self.scorer.refine(0, projected, tokens.proposals)
                encoded.predictions["_backbone"] = logits, boxes
        if not tokens.has_padding:
            return scores
        # The gradient of padded tokens goes to the lowest score, as published.
        return torch.where(tokens.mask, scores.min(), scores)

    def losses(
        self, encoded: EncoderOutput, decoded: DecoderOutput, tokens: Tokens, targets: list[Target]
    ) -> dict[str, Tensor]:
        """``loss_mask_prediction``: the scores against the decoder attention map of this step."""
        if not self.needs_decoder_samples:
            return {}
        assert encoded.kept is not None and encoded.scores is not None
        attention_map = attention_map_splat(
            [layer.locations for layer in decoded.samples],
            [layer.weights for layer in decoded.samples],
            tokens.shapes,
        )  # (B, N)
        if self.elastic is None:
            target = attention_map_target(attention_map, tokens.mask, encoded.selected_mask)
        else:
            target = attention_map_share(attention_map, tokens.mask, self.elastic)
        encoded.intermediate.update(attention_map=attention_map, target=target)
        # The share of the decoder's attention on the kept tokens, of all levels and of each.
        shares = correspondence(attention_map, encoded.kept.ranked, tokens.shapes)
        encoded.metrics.update({f"corr_mask_attn_map_dec_{name}": share for name, share in shares.items()})
        loss = scoring_loss(encoded.scores, target, tokens.mask if self.mask_padding else None)
        return {"loss_mask_prediction": self.loss_weight * loss}
