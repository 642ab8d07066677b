"""Focus-DETR, R50, 36 epochs: 50.4 AP published.

The authors drop the learning rate after epoch 20 in this schedule too. (The config in detrex
refers to a schedule that does not exist there.)
"""

from .focus_detr_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/focus_detr_r50_4scale_36ep"
train.epochs = 36
lr_multiplier.milestones = [20]
model.transformer.position.update(temperature=20.0, offset=0.0)
