"""Lite-DINO H2L2-(2+1)x3, R50, 36 epochs: 49.9 AP published (Lite DETR, Table 4)."""

from .lite_dino_r50_h3l1_2p1x3_36ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/lite_dino_r50_h2l2_2p1x3_36ep"
model.transformer.encoder.num_high_levels = 2
