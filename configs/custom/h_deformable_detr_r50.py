"""H-Deformable-DETR, R50, fine-tuned on data of your own.

    python train_net.py --config-file configs/custom/h_deformable_detr_r50.py \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=... \\
        train.init_checkpoint=...

``train.init_checkpoint``: ``published`` for the authors' checkpoint of 12 epochs, that of 36, one of
your own, or nothing to start from an ImageNet backbone.
"""

from ..common.fine_tune import data, dataloader, lr_multiplier, optimizer, train
from ..h_deformable_detr.h_deformable_detr_r50_12ep import model

model.num_classes = None  # read from data.train_json
model.exact_sizes = True
train.output_dir = "./output/custom/h_deformable_detr_r50"
