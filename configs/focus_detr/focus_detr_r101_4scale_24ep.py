"""Focus-DETR, R101, 24 epochs: 51.2 AP published."""

from .focus_detr_r50_4scale_24ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/focus_detr_r101_4scale_24ep"
model.backbone.stages.depth = 101
