"""Two-stage Deformable DETR on ResNet-101; not a published configuration."""

from .deformable_detr_r50_two_stage_50ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/deformable_detr_r101_two_stage_50ep"
model.backbone.stages.depth = 101
