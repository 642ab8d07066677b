"""Sparse DETR, keep ratio 30 %, on data of your own on a small machine.

As deformable_detr_r50_custom, which is its dense base: same data, budget and decoder.
"""

from sparse_detr.modeling import SparseDETR

from ..encoders.sparse import encoder as _encoder
from .deformable_detr_r50_custom import data, dataloader, lr_multiplier, model, optimizer, train

model._target_ = SparseDETR
_encoder.num_layers = model.transformer.encoder.num_layers
model.transformer.encoder = _encoder

train.output_dir = "./output/quick/sparse_detr_r50_custom"
