"""Sparse DETR, keep ratio 30 %, made small enough to learn *Shapes* on a CPU in minutes."""

from sparse_detr.modeling import SparseDETR

from ..encoders.sparse import encoder as _encoder
from .deformable_detr_shapes import data, dataloader, lr_multiplier, model, optimizer, train

model._target_ = SparseDETR
_encoder.num_layers = model.transformer.encoder.num_layers
_encoder.keep_ratio = 0.3
model.transformer.encoder = _encoder

train.output_dir = "./output/quick/sparse_detr_shapes"
