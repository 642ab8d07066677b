"""Sparse DETR's encoder, for any two-stage base: ``model.transformer.encoder = encoder``."""

from detectron2.config import LazyCall as L

from sparse_detr.modeling import SparseEncoder

from ..models.deformable_detr import model as base

encoder = L(SparseEncoder)(
    layer=base.transformer.encoder.layer,
    num_layers=6,
    keep_ratio=0.3,
    embed_dim="${model.transformer.embed_dim}",
    num_classes="${model.num_classes}",
    auxiliary_heads=True,
    loss_weight=1.0,
    scoring="attention_map",  # or "objectness"
    mask_padding=False,
)
