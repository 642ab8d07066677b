"""DINO 4-scale, R50, 36 epochs, detrex's model and recipe; not a published configuration.

The authors' 50.9 AP is that of their model: dino_official_r50_4scale_12ep with their schedule.
"""

from .dino_r50_4scale_24ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/dino_r50_4scale_36ep"
train.epochs = 36
lr_multiplier.milestones = [30]
