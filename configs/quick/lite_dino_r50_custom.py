"""Lite-DINO H3L1-(2+1)x1 on data of your own on a small machine."""

from sparse_detr.modeling import LiteDETR

from ..encoders.lite import attention as _attention
from ..encoders.lite import encoder as _encoder
from .dino_r50_custom import data, dataloader, lr_multiplier, model, optimizer, train

model._target_ = LiteDETR
_encoder.num_layers = model.transformer.encoder.num_layers
_encoder.num_blocks = 1
model.transformer.encoder = _encoder
model.transformer.decoder.layer.cross_attention = _attention

train.output_dir = "./output/quick/lite_dino_r50_custom"
