"""Focus-DETR, Swin-L of ImageNet-22k, 36 epochs: 56.3 AP published."""

from .focus_detr_swin_large_384_4scale_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "./output/focus_detr_swin_large_384_4scale_36ep"
train.epochs = 36
lr_multiplier.milestones = [30]
