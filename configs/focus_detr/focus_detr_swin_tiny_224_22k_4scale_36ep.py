"""Focus-DETR, Swin-T of ImageNet-22k, 36 epochs: 53.2 AP published."""

from .focus_detr_swin_tiny_224_4scale_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.init_checkpoint = "./weights/swin_tiny_patch4_window7_224_22kto1k_finetune.pth"
train.output_dir = "./output/focus_detr_swin_tiny_224_22k_4scale_36ep"
train.epochs = 36
lr_multiplier.milestones = [30]
