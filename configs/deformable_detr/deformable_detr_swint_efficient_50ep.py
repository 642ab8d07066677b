"""Deformable DETR + top-k & box refinement, Swin-T: 48.0 AP published (Sparse DETR, Table 1)."""

from ..models.backbones import swin_tiny
from .deformable_detr_r50_efficient_50ep import dataloader, lr_multiplier, model, optimizer, train

# The ImageNet-1k weights of the Swin authors: swin_tiny_patch4_window7_224.pth
train.init_checkpoint = "./weights/swin_tiny_patch4_window7_224.pth"
train.output_dir = "./output/deformable_detr_swint_efficient_50ep"
model.backbone = swin_tiny.backbone
model.in_features = swin_tiny.in_features
model.neck.in_channels = swin_tiny.in_channels
