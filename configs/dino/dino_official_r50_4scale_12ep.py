"""DINO 4-scale, R50, 12 epochs, as its authors configure it: 49.0 AP published.

Shared decoder heads, position temperature 20, weight decay on norms too, images without objects
kept. Box noise 1.0 as in the launch scripts; the config file says 0.4. 24 and 36 epochs (50.4 and
50.9 AP): train.epochs=24 lr_multiplier.milestones=[20], train.epochs=36 lr_multiplier.milestones=[30].
"""

from ..models.dino import official as model
from .dino_r50_4scale_12ep import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/dino_official_r50_4scale_12ep"
optimizer.params.weight_decay_norm = None
dataloader.train.dataset.filter_empty = False
