"""DINO 4-scale, R50, 36 epochs: 50.9 AP published (authors' README)."""

from .dino_r50_4scale_24ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/dino_r50_4scale_36ep"
train.epochs = 36
lr_multiplier.milestones = [30]
