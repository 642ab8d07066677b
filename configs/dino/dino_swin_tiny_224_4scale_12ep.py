"""DINO 4-scale, Swin-T, 12 epochs: 51.3 AP published (detrex)."""

from ..models.backbones import swin_tiny
from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "./weights/swin_tiny_patch4_window7_224.pth"
train.output_dir = "./output/dino_swin_tiny_224_4scale_12ep"
model.backbone = swin_tiny.backbone
model.in_features = swin_tiny.in_features
model.neck.in_channels = swin_tiny.in_channels
model.backbone.drop_path_rate = 0.1
model.backbone.frozen_stages = -1
