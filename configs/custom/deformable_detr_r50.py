"""Two-stage Deformable DETR, R50, fine-tuned on data of your own.

    python train_net.py --config-file configs/custom/deformable_detr_r50.py \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=... \\
        train.init_checkpoint=...

``train.init_checkpoint``: ``published`` for the authors' two-stage checkpoint, one of your own, or
nothing to start from an ImageNet backbone.
"""

from ..common.fine_tune import data, dataloader, lr_multiplier, optimizer, train
from ..deformable_detr.deformable_detr_r50_two_stage_50ep import model

model.num_classes = None  # read from data.train_json
model.exact_sizes = True
train.output_dir = "./output/custom/deformable_detr_r50"
