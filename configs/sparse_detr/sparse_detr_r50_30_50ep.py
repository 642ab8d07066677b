"""Sparse DETR, R50, keep ratio 30 %: 46.0 AP published (Sparse DETR, Table 1).

The keep ratio may differ between training and inference: model.transformer.encoder.keep_ratio=0.2.
"""

from sparse_detr.modeling import SparseDETR

from ..deformable_detr.deformable_detr_r50_efficient_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from ..encoders.sparse import encoder as _encoder

train.output_dir = "./output/sparse_detr_r50_30_50ep"
model._target_ = SparseDETR
model.transformer.encoder = _encoder
model.transformer.encoder.keep_ratio = 0.3
