"""H-Deformable-DETR, R50, 36 epochs: 50.0 AP published (authors' README)."""

from .h_deformable_detr_r50_12ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/h_deformable_detr_r50_36ep"
train.epochs = 36
lr_multiplier.milestones = [30]
