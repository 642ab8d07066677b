"""Lite-DINO H3L1-(2+1)x3 with plain deformable attention (published ``key_aware=False``), R50."""

from ..encoders.lite import plain_attention as _attention
from .lite_dino_r50_h3l1_2p1x3_36ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/lite_dino_plain_r50_h3l1_2p1x3_36ep"
model.transformer.encoder.layer.attention = _attention
model.transformer.decoder.layer.cross_attention = _attention
