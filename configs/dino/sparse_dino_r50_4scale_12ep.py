"""Sparse DETR's encoder on DINO, R50, 12 epochs, keep ratio 30 %; not a published configuration.

The Focus-DETR paper compares itself with such a model (48.2 AP after 36 epochs).
"""

from ..encoders.sparse import encoder as _encoder
from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/sparse_dino_r50_4scale_12ep"
_encoder.keep_ratio = 0.3
model.transformer.encoder = _encoder
