"""What encoders of several methods are built from, following the base's decoder in all its numbers."""

from detectron2.config import LazyCall as L

from sparse_detr.modeling import DualAttentionLayer, MSDeformAttn

attention = L(MSDeformAttn)(
    embed_dim="${model.transformer.embed_dim}",
    num_heads="${model.transformer.decoder.layer.num_heads}",
    num_levels="${model.transformer.num_levels}",
    num_points="${model.transformer.decoder.layer.cross_attention.num_points}",
)

dual_attention_layer = L(DualAttentionLayer)(
    attention=attention,
    embed_dim="${model.transformer.embed_dim}",
    num_heads="${model.transformer.decoder.layer.num_heads}",
    ffn_dim="${model.transformer.decoder.layer.ffn_dim}",
    dropout="${model.transformer.decoder.layer.dropout}",
)
