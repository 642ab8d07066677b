"""DINO 4-scale, Swin-B of ImageNet-22k, 12 epochs: 55.8 AP published (detrex)."""

from ..models.backbones import swin_base_384
from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "./weights/swin_base_patch4_window12_384_22kto1k.pth"
train.output_dir = "./output/dino_swin_base_384_4scale_12ep"
model.backbone = swin_base_384.backbone
model.in_features = swin_base_384.in_features
model.neck.in_channels = swin_base_384.in_channels
