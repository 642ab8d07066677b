"""RT-DETR's hybrid encoder on DINO, on data of your own on a small machine."""

from ..encoders.rt_detr import encoder as _encoder
from .dino_r50_custom import data, dataloader, lr_multiplier, model, optimizer, train

model.transformer.encoder = _encoder

train.output_dir = "./output/quick/hybrid_dino_r50_custom"
