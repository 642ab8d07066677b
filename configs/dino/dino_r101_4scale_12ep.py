"""DINO 4-scale, R101, 12 epochs: 50.0 AP published (detrex)."""

from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/dino_r101_4scale_12ep"
model.backbone.stages.depth = 101
