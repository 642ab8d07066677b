"""DINO 4-scale, Swin-S, 12 epochs: 53.0 AP published (detrex)."""

from ..models.backbones import swin_small
from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "./weights/swin_small_patch4_window7_224.pth"
train.output_dir = "./output/dino_swin_small_224_4scale_12ep"
model.backbone = swin_small.backbone
model.in_features = swin_small.in_features
model.neck.in_channels = swin_small.in_channels
