"""RT-DETR, R50-D, 72 epochs of 640x640 pixels: 53.1 AP published.

The recipe the other RT-DETR configs start from; the learning rate never drops, and what is evaluated is
the moving average of the weights. ``train.init_checkpoint`` is the authors' ImageNet backbone.
"""

from ..common.data.coco import dataloader
from ..common.data.squares import test_augmentations as _test
from ..common.data.squares import train_augmentations as _train
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train
from ..models.rt_detr import model

train.init_checkpoint = (
    "https://github.com/lyuwenyu/storage/releases/download/v0.1/"
    "ResNet50_vd_ssld_v2_pretrained_from_paddle.pth"
)
train.output_dir = "./output/rt_detr_r50_72ep"
train.epochs = 72
train.model_ema.update(enabled=True, decay=0.9999, warmup=2000)
lr_multiplier.milestones = []
optimizer.lr = 1e-4
optimizer.params.weight_decay_norm = 0.0
optimizer.params.weight_decay_bias = 0.0
optimizer.params.overrides = {"in_proj_bias": {"weight_decay": 0.0}}
optimizer.params.lr_factor_func.rules = {"backbone": 0.1}
dataloader.train.aspect_ratio_grouping = False  # all images have one shape
dataloader.train.mapper.augmentations = _train
dataloader.train.mapper.augmentations.sizes = [*range(480, 801, 32), 640, 640]
dataloader.test.mapper.augmentations = _test
model.neck.norm = "SyncBN"  # statistics over the images of all GPUs
model.transformer.encoder.fusion.norm = "SyncBN"
