"""Salience DETR, ConvNeXt-L of ImageNet-1k, 12 epochs: 54.2 AP published."""

from ..models.backbones import torchvision_convnext_large as _backbone
from .salience_detr_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "./weights/convnext_large-ea097f82.pth"
train.output_dir = "./output/salience_detr_convnext_large_4scale_12ep"
model.backbone = _backbone["backbone"]
model.in_features = _backbone["in_features"]
model.neck.in_channels = _backbone["in_channels"]
