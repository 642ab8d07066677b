"""Lite-DINO H3L1-(2+1)x3 with a backbone of timm: model.backbone.name=resnet18, or another.

Not a published configuration. Needs the package timm; see docs/backbones.md.
"""

from ..models.backbones import timm, timm_input
from .lite_dino_r50_h3l1_2p1x3_36ep import dataloader, lr_multiplier, model, optimizer, train

model.update(timm_input)
model.backbone = timm.backbone
model.in_features = timm.in_features
model.neck.in_channels = timm.in_channels
train.init_checkpoint = "timm://${model.backbone.name}"  # ImageNet weights
train.output_dir = "./output/lite_dino_timm_h3l1_2p1x3_36ep"
