"""Deformable DETR, R50, single stage: 44.5 AP published (README of the authors' code, batch 32)."""

from ..common.data.coco import dataloader
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train
from ..models.deformable_detr import model

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "./output/deformable_detr_r50_50ep"
dataloader.train.total_batch_size = 32
