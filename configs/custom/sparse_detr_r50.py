"""Sparse DETR, R50, keep ratio 30 %, fine-tuned on data of your own.

    python train_net.py --config-file configs/custom/sparse_detr_r50.py \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=... \\
        train.init_checkpoint=...

``train.init_checkpoint``: ``published`` for the authors' checkpoint of that keep ratio, one of your own,
or nothing to start from an ImageNet backbone.
"""

from ..common.fine_tune import data, dataloader, lr_multiplier, optimizer, train
from ..sparse_detr.sparse_detr_r50_30_50ep import model

model.num_classes = None  # read from data.train_json
model.exact_sizes = True
train.output_dir = "./output/custom/sparse_detr_r50"
