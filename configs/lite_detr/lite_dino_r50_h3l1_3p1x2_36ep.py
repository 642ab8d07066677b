"""Lite-DINO H3L1-(3+1)x2, R50, 36 epochs; no result published for this base."""

from .lite_dino_r50_h3l1_2p1x3_36ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/lite_dino_r50_h3l1_3p1x2_36ep"
model.transformer.encoder.num_blocks = 2
