"""Sparse DETR's encoder, for any two-stage base: ``model.transformer.encoder = encoder``.

Layers follow the base's decoder in width, heads, points and dropout.
"""

from detectron2.config import LazyCall as L

from sparse_detr.modeling import DeformableEncoderLayer, SparseEncoder

from ..common.encoder_layers import attention

encoder = L(SparseEncoder)(
    layer=L(DeformableEncoderLayer)(
        attention=attention,
        embed_dim="${model.transformer.embed_dim}",
        ffn_dim="${model.transformer.decoder.layer.ffn_dim}",
        dropout="${model.transformer.decoder.layer.dropout}",
    ),
    num_layers=6,
    keep_ratio=0.3,
    embed_dim="${model.transformer.embed_dim}",
    num_classes="${model.num_classes}",
    auxiliary_heads=True,
    loss_weight=1.0,
    scoring="attention_map",  # or "objectness"
    mask_padding="${model.exact_sizes}",
    elastic=None,  # or the range to train for, [0.05, 1]
)
