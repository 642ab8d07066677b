"""Lite-DINO H3L1-(2+1)x3, R50, fine-tuned on data of your own.

    python train_net.py --config-file configs/custom/lite_dino_r50.py \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=... \\
        train.init_checkpoint=...

``train.init_checkpoint``: ``published`` for the authors' checkpoint of that variant, one of your own, or
nothing to start from an ImageNet backbone.
"""

from ..common.fine_tune import data, dataloader, lr_multiplier, train
from ..lite_detr.lite_dino_r50_h3l1_2p1x3_36ep import model, optimizer

model.num_classes = None  # read from data.train_json
model.exact_sizes = True
optimizer.lr = 5e-5  # half of the published rate
train.output_dir = "./output/custom/lite_dino_r50"
