"""Sparse DETR, keep ratio 30 %, with a backbone of timm, on data of your own.

    python train_net.py --config-file configs/custom/sparse_detr_timm.py model.backbone.name=resnet18 \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=...

Starts from the backbone's ImageNet weights: train longer than from a detector (docs/own_data.md). Needs
the package timm; see docs/backbones.md.
"""

from ..common.fine_tune import data, dataloader, lr_multiplier, optimizer, train
from ..sparse_detr.sparse_detr_timm_30_50ep import model

model.num_classes = None  # read from data.train_json
model.exact_sizes = True
train.init_checkpoint = "timm://${model.backbone.name}"  # ImageNet weights
train.output_dir = "./output/custom/sparse_detr_timm"
