"""H-Deformable-DETR, Swin-T, 12 epochs: 50.6 AP published (authors' README).

51.2 AP with optimizer.weight_decay=0.05.
"""

from .h_deformable_detr_swint_36ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/h_deformable_detr_swint_12ep"
train.epochs = 12
lr_multiplier.milestones = [11]
