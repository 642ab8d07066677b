"""DINO 5-scale, Swin-L of ImageNet-22k, 36 epochs: 58.5 AP published (detrex)."""

from .dino_swin_large_384_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/dino_swin_large_384_5scale_36ep"
train.epochs = 36
lr_multiplier.milestones = [30]
