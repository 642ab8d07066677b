"""RT-DETR's hybrid encoder on DINO, R50, four levels; not a published configuration."""

from ..dino.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train
from ..encoders.rt_detr import encoder as _encoder

train.output_dir = "./output/hybrid_dino_r50_4scale_12ep"
model.transformer.encoder = _encoder
model.transformer.encoder.fusion.norm = "SyncBN"  # statistics over the images of all GPUs
