"""Focus-DETR, Swin-B of ImageNet-22k, 36 epochs: 56.2 AP published.

(A second published file, "swin_base_224", is this model with the 12-epoch schedule by mistake.)
"""

from .focus_detr_swin_base_384_4scale_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "./output/focus_detr_swin_base_384_4scale_36ep"
train.epochs = 36
lr_multiplier.milestones = [30]
