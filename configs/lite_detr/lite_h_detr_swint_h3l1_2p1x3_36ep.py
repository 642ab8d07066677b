"""Lite-H-DETR H3L1-(2+1)x3, Swin-T, 36 epochs: 53.0 AP published (Lite DETR, Table 4).

Dense 53.2 AP.
"""

from ..encoders.lite import attention as _attention
from ..encoders.lite import encoder as _encoder
from ..h_deformable_detr.h_deformable_detr_swint_36ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "./output/lite_h_detr_swint_h3l1_2p1x3_36ep"
model.transformer.encoder = _encoder
model.transformer.decoder.layer.cross_attention = _attention
