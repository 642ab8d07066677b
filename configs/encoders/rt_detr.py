"""RT-DETR's hybrid encoder for any base: ``model.transformer.encoder = encoder``.

The attention layer follows the base's decoder in width, heads and dropout. It looks at the coarsest map
only: level 3 of 4 (stride 64), or, as published, of 3 (``model.transformer.num_levels=3``, stride 32).
Released models have ``expansion=1`` (R50, R101) or 0.5 (R18, R34).
"""

from detectron2.config import LazyCall as L

from sparse_detr.modeling import FusionNeck, HybridEncoder, IntraScaleLayer

encoder = L(HybridEncoder)(
    layer=L(IntraScaleLayer)(
        embed_dim="${model.transformer.embed_dim}",
        num_heads="${model.transformer.decoder.layer.num_heads}",
        ffn_dim="${model.transformer.decoder.layer.ffn_dim}",
        dropout="${model.transformer.decoder.layer.dropout}",
    ),
    num_layers=1,
    fusion=L(FusionNeck)(
        embed_dim="${model.transformer.embed_dim}",
        num_levels="${model.transformer.num_levels}",
        groups=1,
        context=False,
        expansion=1.0,
        norm="BN",
        mask_padding="${model.exact_sizes}",
    ),
    mask_padding="${model.exact_sizes}",
)
