"""Salience DETR, R50, 12 epochs: 50.0 AP published (the released model; 49.2 in the paper).

The recipe the other Salience DETR configs start from. The authors trained with 10 images, 5 on each of
two GPUs, and started from torchvision's newer ImageNet weights (ResNet50_Weights.IMAGENET1K_V2, which
detectron2 does not have): the published AP needs that file.
"""

from ..dino.dino_r50_4scale_12ep import dataloader, lr_multiplier, optimizer, train
from ..models.salience_detr import model

train.init_checkpoint = "./weights/resnet50-11ad3fa6.pth"
train.output_dir = "./output/salience_detr_r50_4scale_12ep"
lr_multiplier.milestones = [10]
dataloader.train.total_batch_size = 10
optimizer.params.weight_decay_bias = 0.0
optimizer.params.overrides = {"in_proj_bias": {"weight_decay": 0.0}}
optimizer.params.lr_factor_func.rules = {
    "backbone": 0.1,
    "sampling_offsets": 0.1,
    "reference_points": 0.1,
}
model.transformer.fusion.norm = "SyncBN"  # statistics over the images of all GPUs
