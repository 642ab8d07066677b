"""Focus-DETR, Swin-B of ImageNet-22k, 24 epochs; not a published configuration."""

from .focus_detr_swin_base_384_4scale_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "./output/focus_detr_swin_base_384_4scale_24ep"
train.epochs = 24
lr_multiplier.milestones = [20]
