"""DINO 4-scale, R50, 12 epochs: 49.2 AP published (detrex).

The recipe the other DINO configs start from. detrex counts 7500 iterations as an epoch, 2.3 % more
than COCO has here (117,266 images); exactly as many steps as there, with the drop at 82,500:
train.max_iter=90000 lr_multiplier.milestones=[11.2565].

Images without objects may stay in (dataloader.train.dataset.filter_empty=False): every loss is
defined for them.
"""

from ..common.data.coco import dataloader
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train
from ..models.dino import model

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "./output/dino_r50_4scale_12ep"
train.epochs = 12
lr_multiplier.milestones = [11]
optimizer.lr = 1e-4
optimizer.params.weight_decay_norm = 0.0
optimizer.params.lr_factor_func.rules = {"backbone": 0.1}
dataloader.train.dataset.filter_empty = True  # as published
