"""Salience DETR, R50, fine-tuned on data of your own.

    python train_net.py --config-file configs/custom/salience_detr_r50.py \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=... \\
        train.init_checkpoint=...

``train.init_checkpoint``: one of the authors' R50 checkpoints, one of your own, or nothing to start from
an ImageNet backbone.
"""

from ..common.fine_tune import data, dataloader, lr_multiplier, train
from ..salience_detr.salience_detr_r50_4scale_12ep import model, optimizer

model.num_classes = None  # read from data.train_json
model.exact_sizes = True
optimizer.lr = 5e-5  # half of the published rate
train.output_dir = "./output/custom/salience_detr_r50"
