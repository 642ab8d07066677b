"""Lite DETR's encoder: refresh the few high-level tokens often, the many low-level ones seldom.

Lite DETR (Li et al., CVPR 2023), Sec. 3.3 "Interleave Update" and Fig. 2. The coarsest maps hold a
small part of the tokens (three of four maps: a quarter) and most of what detection needs. The
encoder is a row of blocks; inside a block only high-level tokens attend over all tokens, and at its
end the low-level ones do so too, with a smaller feed-forward network.
"""

from __future__ import annotations

__all__ = ["LiteEncoder", "LiteEncoderLayer"]

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..encoder import DeformableEncoderLayer, Encoder, EncoderOutput, LayerInput, Steps
from ..layers import FFN, clone_layers
from ..selection import TokenRange
from ..tokens import LevelShapes, Tokens

if TYPE_CHECKING:
    from ..proposals import ProposalHead


class LiteEncoderLayer(DeformableEncoderLayer):
    """A deformable layer with a second, smaller feed-forward network for low-level tokens.

    Args:
        low_ffn_dim: its width; None sends all tokens through the same network.
    """

    def __init__(
        self,
        *,
        attention: nn.Module,
        embed_dim: int = 256,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
        low_ffn_dim: int | None = 256,
    ):
        super().__init__(attention=attention, embed_dim=embed_dim, ffn_dim=ffn_dim, dropout=dropout)
        self.low_ffn = None
        if low_ffn_dim is not None:
            self.low_ffn = FFN(embed_dim=embed_dim, ffn_dim=low_ffn_dim, dropout=dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: LevelShapes,
        mask: Tensor | None,
        num_low: int = 0,
    ) -> Tensor:
        """Refresh ``x`` (B, K, C), whose first ``num_low`` tokens are low-level ones; other
        arguments as in ``DeformableEncoderLayer``."""
        x = self.attend(x, position, reference, value, shapes, mask)
        if self.low_ffn is None:
            return self.ffn(x)
        low, high = x[:, :num_low], x[:, num_low:]
        return torch.cat([self.low_ffn(low), self.ffn(high)], dim=1)


class LiteEncoder(Encoder):
    """(A+1)xB blocks: A updates of the high-level tokens, one of the low-level ones, B times.

    High-level are the tokens of the ``num_high_levels`` coarsest maps ("H3L1": three of four).

    Args:
        num_layers: A * B, updates of the high-level tokens in all.
        num_blocks: B. (2+1)x3 is ``num_layers=6, num_blocks=3``; (6+1)x1 has one block.
        num_high_levels: 1 to ``num_levels``; with all levels high every layer refreshes all
            tokens.
        merge_low_update: the last layer of a block refreshes all tokens, high and low, from the
            same attention, as in the published code and its checkpoints. False gives the block of
            the paper's Fig. 2: A high-level updates, then a layer of its own that refreshes the
            low-level tokens from the high-level ones already refreshed.
    """

    published_names = {
        "authors": (
            (r"^transformer\.encoder\.(layers\.\d+\.)linear([12])2\.", r"\1low_ffn.linear\2."),
            (r"^transformer\.encoder\.(layers\.\d+\.)norm22\.", r"\1low_ffn.norm."),
        )
    }
    # Published key-unaware attention has query projections that it never calls.
    published_unused = (r"attention\.query_proj\.",)

    def __init__(
        self,
        *,
        layer: LiteEncoderLayer,
        num_layers: int = 6,
        num_blocks: int = 3,
        num_high_levels: int = 3,
        num_levels: int = 4,
        merge_low_update: bool = True,
    ):
        super().__init__()
        if num_blocks < 1 or num_layers % num_blocks:
            raise ValueError(
                f"LiteEncoder: num_layers={num_layers} must be a multiple of num_blocks="
                f"{num_blocks}: every block has the same number of high-level updates"
            )
        if not 1 <= num_high_levels <= num_levels:
            raise ValueError(
                f"LiteEncoder: num_high_levels={num_high_levels} must lie in 1..{num_levels}, the "
                "number of levels"
            )
        if num_high_levels == num_levels and not merge_low_update:
            raise ValueError(
                f"LiteEncoder: merge_low_update=False needs low-level tokens to update, but "
                f"num_high_levels={num_high_levels} makes all levels high; take fewer"
            )
        self.num_high_levels = num_high_levels
        self.layers_per_block = num_layers // num_blocks
        self.layers = clone_layers(layer, num_layers)
        self.low_layers = None
        if not merge_low_update:
            low = copy.deepcopy(layer)
            if low.low_ffn is not None:  # the only one that this layer needs
                low.ffn, low.low_ffn = low.low_ffn, None
            self.low_layers = clone_layers(low, num_blocks)
        for index, each in enumerate(self.layers):
            if not self.is_global(index):
                each.low_ffn = None

    def published_notes(self) -> list[str]:
        return [
            f"model.transformer.encoder.num_high_levels={self.num_high_levels} comes from the config, the "
            "weights do not tell: published checkpoints named H3L1 (s3) have 3, H2L2 (s2) have 2; a wrong "
            "value loads without an error and costs AP"
        ]

    def is_global(self, index: int) -> bool:
        """Whether layer ``index`` refreshes all tokens, not only the high-level ones."""
        return self.low_layers is None and (index + 1) % self.layers_per_block == 0

    def steps(self, tokens: Tokens, proposal_head: ProposalHead | None, encoded: EncoderOutput) -> Steps:
        """Blocks of high-level updates, each closed by one that reaches the low levels (Fig. 2)."""
        num_low = tokens.level_starts[-self.num_high_levels]  # the finest level comes first
        everything, high = TokenRange(tokens), TokenRange(tokens, num_low)
        low = TokenRange(tokens, 0, num_low)
        steps = []
        for index, layer in enumerate(self.layers):
            steps.append((layer, everything if self.is_global(index) else high))
            if self.low_layers is not None and (index + 1) % self.layers_per_block == 0:
                steps.append((self.low_layers[index // self.layers_per_block], low))
        return steps

    def refresh(self, layer: nn.Module, given: LayerInput) -> Tensor:
        assert isinstance(given.chosen, TokenRange)
        num_low = given.tokens.level_starts[-self.num_high_levels] if given.chosen.start == 0 else 0
        return layer(*given.deformable, num_low=num_low)
