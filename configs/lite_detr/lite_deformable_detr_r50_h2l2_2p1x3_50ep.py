"""Lite-Deformable DETR H2L2-(2+1)x3, R50: 45.8 AP published (Lite DETR, Table 3)."""

from .lite_deformable_detr_r50_h3l1_2p1x3_50ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "./output/lite_deformable_detr_r50_h2l2_2p1x3_50ep"
model.transformer.encoder.num_high_levels = 2
