"""The recipe of ``configs/custom``: a model trained on COCO goes on with data of your own.

The published rates belong to 16 images per step (Deformable DETR's to 32); here it is 8 and half the
rate. From a backbone alone (ImageNet weights), train longer: train.epochs=50
lr_multiplier.milestones=[40].
"""

from .data.custom import data, dataloader
from .optim import lr_multiplier, optimizer
from .train import train

dataloader.train.total_batch_size = 8
optimizer.lr = 1e-4
lr_multiplier.milestones = [20]
lr_multiplier.warmup_iters = 200  # the class heads are new
train.epochs = 24
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
