"""Salience DETR's encoder and neck on two-stage Deformable DETR, R50; not a published configuration.

The two-stage head gets a class per channel (it scores tokens in the encoder), as in Sparse DETR's
dense base.
"""

from ..deformable_detr.deformable_detr_r50_efficient_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from ..encoders.salience import encoder as _encoder
from ..encoders.salience import fusion as _fusion

train.output_dir = "./output/salience_deformable_detr_r50_50ep"
model.transformer.encoder = _encoder
model.transformer.fusion = _fusion
