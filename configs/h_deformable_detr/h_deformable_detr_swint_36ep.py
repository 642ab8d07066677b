"""H-Deformable-DETR, Swin-T, 36 epochs: 53.2 AP published (authors' README).

53.7 AP with optimizer.weight_decay=0.05.
"""

from ..models.backbones import swin_tiny
from .h_deformable_detr_r50_36ep import dataloader, lr_multiplier, model, optimizer, train

# The ImageNet-1k weights of the Swin authors: swin_tiny_patch4_window7_224.pth
train.init_checkpoint = "./weights/swin_tiny_patch4_window7_224.pth"
train.output_dir = "./output/h_deformable_detr_swint_36ep"
model.backbone = swin_tiny.backbone
model.in_features = swin_tiny.in_features
model.neck.in_channels = swin_tiny.in_channels
model.backbone.frozen_stages = -1  # train all of it
