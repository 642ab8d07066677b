"""H-Deformable-DETR, R50, 12 epochs: 48.7 AP published (authors' README)."""

from ..common.data.coco import dataloader
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train
from ..models.hdetr import model

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "./output/h_deformable_detr_r50_12ep"
train.epochs = 12
lr_multiplier.milestones = [11]
