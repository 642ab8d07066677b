"""Focus-DETR, Swin-T, 36 epochs: 52.5 AP published."""

from .focus_detr_swin_tiny_224_4scale_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "./output/focus_detr_swin_tiny_224_4scale_36ep"
train.epochs = 36
lr_multiplier.milestones = [30]
