"""Salience DETR, Swin-L of ImageNet-22k, 12 epochs: 56.5 AP published.

The weights to start from are the Swin authors'; they load under torchvision's names too.
"""

from ..models.backbones import torchvision_swin_large as _backbone
from .salience_detr_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "./weights/swin_large_patch4_window7_224_22k.pth"
train.output_dir = "./output/salience_detr_swin_large_224_4scale_12ep"
model.backbone = _backbone["backbone"]
model.in_features = _backbone["in_features"]
model.neck.in_channels = _backbone["in_channels"]
