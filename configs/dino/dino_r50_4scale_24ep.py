"""DINO 4-scale, R50, 24 epochs: 50.6 AP published (detrex)."""

from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/dino_r50_4scale_24ep"
train.epochs = 24
lr_multiplier.milestones = [20]
model.transformer.position.update(temperature=20.0, offset=0.0)
dataloader.train.dataset.filter_empty = False
