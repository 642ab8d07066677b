"""Lite-Deformable DETR H3L1-(2+1)x3, R50: 46.7 AP published (Lite DETR, Table 3; dense 46.8).

No code was released for this base: two-stage Deformable DETR with Lite DETR's encoder and key-aware
attention in encoder and decoder, which is what the paper's parameter counts fit.
"""

from ..deformable_detr.deformable_detr_r50_two_stage_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from ..encoders.lite import attention as _attention
from ..encoders.lite import encoder as _encoder

train.output_dir = "./output/lite_deformable_detr_r50_h3l1_2p1x3_50ep"
model.transformer.encoder = _encoder
model.transformer.decoder.layer.cross_attention = _attention
