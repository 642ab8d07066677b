"""Lite-Deformable DETR H3L1-(3+1)x2, R50: 46.2 AP published (Lite DETR, Table 3)."""

from .lite_deformable_detr_r50_h3l1_2p1x3_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "./output/lite_deformable_detr_r50_h3l1_3p1x2_50ep"
model.transformer.encoder.num_blocks = 2
