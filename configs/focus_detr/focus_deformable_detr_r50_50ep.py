"""Focus-DETR's encoder on two-stage Deformable DETR, R50; not a published configuration.

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
from ..encoders.focus import encoder as _encoder

train.output_dir = "./output/focus_deformable_detr_r50_50ep"
model.transformer.encoder = _encoder
