"""Lite-DINO H2L2-(2+1)x3, Swin-T, 36 epochs: 53.1 AP published (Lite DETR, Table 4)."""

from .lite_dino_swint_h3l1_2p1x3_36ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/lite_dino_swint_h2l2_2p1x3_36ep"
model.transformer.encoder.num_high_levels = 2
