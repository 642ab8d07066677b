"""Focus-DETR, Swin-B of ImageNet-22k, 12 epochs; not a published configuration."""

from ..models.backbones import swin_base_384
from .focus_detr_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

# As the published configs have it; their README says that it was fine-tuned on ImageNet-1k (22kto1k).
train.init_checkpoint = "./weights/swin_base_patch4_window12_384_22k.pth"
train.output_dir = "./output/focus_detr_swin_base_384_4scale_12ep"
model.backbone = swin_base_384.backbone
model.in_features = swin_base_384.in_features
model.neck.in_channels = swin_base_384.in_channels
