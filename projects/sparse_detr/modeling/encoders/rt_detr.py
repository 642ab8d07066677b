"""RT-DETR's efficient hybrid encoder: attention within the coarsest map, convolutions across maps.

RT-DETR (Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", CVPR 2024), Sec. 4.2: only the
coarsest map, whose tokens are few and mean most, is refreshed by self-attention (attention-based
intra-scale feature interaction, AIFI); a pyramid of convolutions, top-down and bottom-up, does the rest
(CNN-based cross-scale feature fusion, CCFF; "CCFM" in the first version). That pyramid is ``FusionNeck``,
which any model may have; here it is a part of the encoder. There is no deformable attention inside.
"""

from __future__ import annotations

__all__ = ["HybridEncoder", "IntraScaleLayer"]

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..encoder import Encoder, EncoderLayer, EncoderOutput, LayerInput, Steps
from ..layers import clone_layers
from ..selection import TokenRange
from ..tokens import Tokens

if TYPE_CHECKING:
    from ..fusion import FusionNeck
    from ..proposals import ProposalHead


_LAYER = r"^(?:model\.)?encoder\.encoder\.0\.layers\.(\d+)"

# transformers' names ("model. ...") and the authors'. Both count the steps of the top-down path from the top;
# there are two between the published models' three levels.
_PUBLISHED = [
    (rf"{_LAYER}\.self_attn\.", r"layers.\1.attention."),
    (rf"{_LAYER}\.(?:self_attn_layer_norm|norm1)\.", r"layers.\1.norm."),
    (rf"{_LAYER}\.(?:fc|linear)([12])\.", r"layers.\1.ffn.linear\2."),
    (rf"{_LAYER}\.(?:final_layer_norm|norm2)\.", r"layers.\1.ffn.norm."),
    (r"^(?:model\.decoder_|decoder\.)input_proj\.(\d+)\.(?:0|conv)\.", r"fusion.output_convs.\1.0."),
    (r"^(?:model\.decoder_|decoder\.)input_proj\.(\d+)\.(?:1|norm)\.", r"fusion.output_convs.\1.1."),
    *(
        (
            rf"^(?:model\.)?encoder\.{theirs}\.{step}\.(.*){part}\.",
            rf"fusion.{ours}.{1 - step if from_top else step}.\g<1>{slot}.",
        )
        for theirs, ours, from_top in (
            ("lateral_convs", "lateral_convs", True),
            ("fpn_blocks", "layer_blocks", True),
            ("downsample_convs", "downsample_blocks", False),
            ("pan_blocks", "pan_blocks", False),
        )
        for step in (0, 1)
        for slot, part in enumerate(("conv", "norm"))
    ),
]


class IntraScaleLayer(EncoderLayer):
    """LayerNorm(x + self-attention), then LayerNorm(x + FFN) with GELU."""

    attention: nn.MultiheadAttention

    def __init__(
        self, *, embed_dim: int = 256, num_heads: int = 8, ffn_dim: int = 1024, dropout: float = 0.0
    ):
        attention = nn.MultiheadAttention(embed_dim, num_heads, dropout=dropout, batch_first=True)
        super().__init__(
            attention=attention, embed_dim=embed_dim, ffn_dim=ffn_dim, dropout=dropout, activation="gelu"
        )

    def init_weights(self) -> None:
        nn.init.zeros_(self.attention.in_proj_bias)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Refresh the tokens ``x`` of a map, which attend to each other.

        Args:
            x, position: (B, K, C) tokens and their position codes.
            mask: (B, K) bool, True on tokens that nothing attends to, or None.

        Returns:
            (B, K, C).
        """
        query = x + position
        mixed, _ = self.attention(query, query, x, key_padding_mask=mask, need_weights=False)
        return self.ffn(self.norm(x + self.dropout(mixed)))


class HybridEncoder(Encoder):
    """Self-attention refreshes the tokens of the coarsest level, then all levels exchange what they hold.

    Position codes are the base's (``model.transformer.position`` and its level embedding); RT-DETR's own
    are in ``configs/models/rt_detr``.

    Args:
        fusion: the pyramid; its output is the memory.
        mask_padding: nothing attends to padding. False attends to whatever it holds, as published, where
            images are resized to one square and never padded. The pyramid has an option of that name, too.
    """

    published_names = {"transformers": _PUBLISHED, "lyuwenyu": _PUBLISHED}
    published_unused = (r"^transformer\.encoder\.fusion\.output_convs\.",)  # ``FusionNeck(project=False)``

    def __init__(
        self,
        *,
        layer: IntraScaleLayer,
        num_layers: int = 1,
        fusion: FusionNeck,
        mask_padding: bool = False,
    ):
        super().__init__()
        self.layers = clone_layers(layer, num_layers)
        self.fusion = fusion
        self.mask_padding = mask_padding

    def steps(self, tokens: Tokens, proposal_head: ProposalHead | None, encoded: EncoderOutput) -> Steps:
        coarsest = TokenRange(tokens, tokens.level_starts[-1])
        return [(layer, coarsest) for layer in self.layers]

    def refresh(self, layer: nn.Module, given: LayerInput) -> Tensor:
        tokens = given.tokens
        mask = given.chosen.gather(tokens.mask) if self.mask_padding and tokens.has_padding else None
        return layer(given.x, given.chosen.position, mask)

    def forward(self, tokens: Tokens, proposal_head: ProposalHead | None = None) -> EncoderOutput:
        encoded = super().forward(tokens, proposal_head)
        encoded.memory = self.fusion(encoded.memory, tokens)
        return encoded
