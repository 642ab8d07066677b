"""Lite-DINO H3L1-(6+1)x1, Swin-T, 36 epochs: 53.3 AP published (Lite DETR, Table 4)."""

from .lite_dino_swint_h3l1_2p1x3_36ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/lite_dino_swint_h3l1_6p1x1_36ep"
model.transformer.encoder.num_blocks = 1
