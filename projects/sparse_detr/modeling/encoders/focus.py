"""Focus-DETR's encoder: refresh foreground tokens, fewer in every layer, in two kinds of attention.

Focus-DETR (Zheng et al., ICCV 2023), Sec. 3: the cascade and the dual attention stand in ``cascade``,
where others share them; here is what ranks the tokens, and what the ranking learns from.
"""

from __future__ import annotations

__all__ = ["FocusEncoder", "FocusEncoderLayer"]

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..boxes import pixel_boxes
from ..cascade import CascadeEncoder, DualAttentionLayer
from ..elastic import KeepRatios
from ..encoder import EncoderOutput
from ..selection import TokenSet, keep_best
from ..tokens import Tokens
from .foreground import DISTANCES, foreground_loss, foreground_targets

if TYPE_CHECKING:
    from ..decoder import DecoderOutput
    from ..matcher import Target

FocusEncoderLayer = DualAttentionLayer  # the layer's name in configs of runs from before it was shared


class FocusEncoder(CascadeEncoder):
    """Foreground tokens attend over all tokens; a layer keeps a share of the one before.

    An image with V valid tokens may refresh ``n = int(keep_ratio * V) + 1`` of them, best first. Other
    arguments as in ``CascadeEncoder``.

    Args:
        keep_ratio: share of the tokens that the first layer may refresh. The released models use
            0.5; the paper's "30 %" is the mean over the layers, 0.5 * mean(layer_ratios).
        strides: cell size of each level in pixels; size_ranges: see ``foreground_targets``.
        distance: "side" as published, or "centre" as the paper describes.
        elastic: (lowest, highest) keep ratio that training draws from, for a model that serves any of
            them; None trains at ``keep_ratio``.
    """

    keep_ratio: float
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
        layer: DualAttentionLayer,
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
        elastic: Sequence[float] | None = None,
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
        self._check_shares(keep_ratio=[keep_ratio])
        self._check_length("levels", num_levels, strides=strides)
        if distance not in DISTANCES:
            raise ValueError(f"FocusEncoder: distance={distance!r} is not one of {', '.join(DISTANCES)}")
        self.keep_ratio = keep_ratio
        self.elastic = None if elastic is None else KeepRatios(*elastic)
        self.strides = tuple(strides)
        self.distance = distance

    def keep(self, tokens: Tokens, scores: Tensor) -> TokenSet:
        """The best ``keep_ratio`` of all tokens."""
        return keep_best(tokens, scores, self.keep_ratio, strict=self.mask_padding)

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
