"""Focus-DETR, R50, 24 epochs: 50.3 AP published."""

from .focus_detr_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/focus_detr_r50_4scale_24ep"
train.epochs = 24
lr_multiplier.milestones = [20]
model.transformer.position.update(temperature=20.0, offset=0.0)
