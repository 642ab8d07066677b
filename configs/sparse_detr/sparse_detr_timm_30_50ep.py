"""Sparse DETR, keep ratio 30 %, with a backbone of timm: model.backbone.name=resnet18, or another.

Not a published configuration. Needs the package timm; see docs/backbones.md.
"""

from ..models.backbones import timm, timm_input
from .sparse_detr_r50_30_50ep import dataloader, lr_multiplier, model, optimizer, train

model.update(timm_input)
model.backbone = timm.backbone
model.in_features = timm.in_features
model.neck.in_channels = timm.in_channels
train.init_checkpoint = "timm://${model.backbone.name}"  # ImageNet weights
train.output_dir = "./output/sparse_detr_timm_30_50ep"
