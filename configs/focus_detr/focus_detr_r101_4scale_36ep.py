"""Focus-DETR, R101, 36 epochs: 51.4 AP published.

The published config builds and initialises a ResNet-50; here it is a ResNet-101. The schedule is
detectron2's 3x: drops at 210k and 250k of 270k iterations (7500 are an epoch there), 1000
iterations of warm-up.
"""

from .focus_detr_r101_4scale_24ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/focus_detr_r101_4scale_36ep"
train.epochs = 36
lr_multiplier.milestones = [28, 33.333]
lr_multiplier.warmup_iters = 1000
