"""Salience DETR's encoder, for any base whose model has a proposal head, and the fusion neck behind it.

Layers follow the base's decoder in width, heads and dropout. ``level_ratios`` are those of the released
models: they keep 51 % of the tokens, of which the layers refresh 31 % of all on average. The encoder
works without ``fusion``, and ``model.transformer.fusion`` behind any other encoder; on another base,
set both.
"""

from detectron2.config import LazyCall as L

from sparse_detr.modeling import FusionNeck, SalienceEncoder

from ..common.encoder_layers import dual_attention_layer

encoder = L(SalienceEncoder)(
    layer=dual_attention_layer,
    num_layers=6,
    embed_dim="${model.transformer.embed_dim}",
    num_levels="${model.transformer.num_levels}",
    level_ratios=[0.4, 0.8, 1.0, 1.0],
    layer_ratios=[1.0, 0.8, 0.6, 0.6, 0.4, 0.2],
    num_objects=300,
    num_places=200,
    size_ranges=[[-1, 64], [64, 128], [128, 256], [256, 99999]],
    loss_weight=2.0,
    mask_padding="${model.exact_sizes}",
)

fusion = L(FusionNeck)(
    embed_dim="${model.transformer.embed_dim}",
    num_levels="${model.transformer.num_levels}",
    groups=4,
    norm="BN",
    mask_padding="${model.exact_sizes}",
)
