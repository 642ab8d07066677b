"""Salience DETR, FocalNet-L of ImageNet-22k, 12 epochs: 57.3 AP published.

Needs the package timm, which has the FocalNet; see docs/backbones.md.
"""

from ..models.backbones import focalnet_large as _backbone
from .salience_detr_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "timm://focalnet_large_fl4.ms_in22k"
train.output_dir = "./output/salience_detr_focalnet_large_4scale_12ep"
model.backbone = _backbone["backbone"]
model.in_features = _backbone["in_features"]
model.neck.in_channels = _backbone["in_channels"]
