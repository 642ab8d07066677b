"""Lite DETR's encoder for any base, and its key-aware attention for the base's decoder.

    model.transformer.encoder = encoder
    model.transformer.decoder.layer.cross_attention = attention

Layers follow the base's decoder in width, heads and dropout; the low-level tokens' feed-forward
network is as wide as the tokens. Published variants, as ``H<high levels>L<low levels>-(A+1)xB``
(``num_high_levels``, ``num_layers`` = A * B = 6, ``num_blocks`` = B): H3L1-(2+1)x3 as below,
H3L1-(3+1)x2, H3L1-(6+1)x1 and H2L2-(2+1)x3. The README of the published code mixes them up: its
H2L2 line gives one high-level map, and its third line, "H2L2-(3+1)x3", is H3L1-(2+1)x3.

Options: ``key_projection`` and ``shared_offsets`` of the attention, ``low_ffn_dim: null`` for one
feed-forward network, ``merge_low_update: false`` for the blocks the paper draws.
``plain_attention`` is the attention of the base (``key_aware=False`` of the published code).
"""

from detectron2.config import LazyCall as L

from sparse_detr.modeling import (
    KeyAwareDeformAttn,
    LiteEncoder,
    LiteEncoderLayer,
    MSDeformAttn,
)

attention = L(KeyAwareDeformAttn)(
    embed_dim="${model.transformer.embed_dim}",
    num_heads="${model.transformer.decoder.layer.num_heads}",
    num_levels="${model.transformer.num_levels}",
    num_points=4,
)

plain_attention = L(MSDeformAttn)(
    embed_dim="${model.transformer.embed_dim}",
    num_heads="${model.transformer.decoder.layer.num_heads}",
    num_levels="${model.transformer.num_levels}",
    num_points=4,
)

encoder = L(LiteEncoder)(
    layer=L(LiteEncoderLayer)(
        attention=attention,
        embed_dim="${model.transformer.embed_dim}",
        ffn_dim="${model.transformer.decoder.layer.ffn_dim}",
        dropout="${model.transformer.decoder.layer.dropout}",
        low_ffn_dim="${model.transformer.embed_dim}",
    ),
    num_layers=6,
    num_blocks=3,
    num_high_levels=3,
    num_levels="${model.transformer.num_levels}",
    merge_low_update=True,
)
