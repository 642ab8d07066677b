"""Lite-H-DETR H3L1-(2+1)x3, R50, 36 epochs: 49.5 AP published (Lite DETR, Table 4; dense 50.0).

No code was released for this base: H-Deformable-DETR with Lite DETR's encoder and key-aware
attention in encoder and decoder.
"""

from ..encoders.lite import attention as _attention
from ..encoders.lite import encoder as _encoder
from ..h_deformable_detr.h_deformable_detr_r50_36ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "./output/lite_h_detr_r50_h3l1_2p1x3_36ep"
model.transformer.encoder = _encoder
model.transformer.decoder.layer.cross_attention = _attention
