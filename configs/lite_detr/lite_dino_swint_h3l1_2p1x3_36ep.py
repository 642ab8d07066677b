"""Lite-DINO H3L1-(2+1)x3, Swin-T, 36 epochs: 53.9 AP published (Lite DETR, Table 4).

As in the paper; the published config file says 46 epochs and box noise 0.4.
"""

from ..models.backbones import swin_tiny
from .lite_dino_r50_h3l1_2p1x3_36ep import dataloader, lr_multiplier, model, optimizer, train

# The ImageNet-1k weights of the Swin authors: swin_tiny_patch4_window7_224.pth
train.init_checkpoint = "./weights/swin_tiny_patch4_window7_224.pth"
train.output_dir = "./output/lite_dino_swint_h3l1_2p1x3_36ep"
model.backbone = swin_tiny.backbone
model.in_features = swin_tiny.in_features
model.neck.in_channels = swin_tiny.in_channels
model.backbone.frozen_stages = -1  # train all of it
