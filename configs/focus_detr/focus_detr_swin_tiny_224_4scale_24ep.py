"""Focus-DETR, Swin-T, 24 epochs: 51.2 AP published."""

from .focus_detr_swin_tiny_224_4scale_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "./output/focus_detr_swin_tiny_224_4scale_24ep"
train.epochs = 24
lr_multiplier.milestones = [20]
