"""Focus-DETR, R50, fine-tuned on data of your own.

    python train_net.py --config-file configs/custom/focus_detr_r50.py \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=... \\
        train.init_checkpoint=...

``train.init_checkpoint``: ``published`` for the authors' 4-scale checkpoint of 12 epochs (one of 24 or
36 epochs needs model.transformer.position.temperature=20 model.transformer.position.offset=0), one of
your own, or nothing to start from an ImageNet backbone.
"""

from ..common.fine_tune import data, dataloader, lr_multiplier, train
from ..focus_detr.focus_detr_r50_4scale_12ep import model, optimizer

model.num_classes = None  # read from data.train_json
model.exact_sizes = True
optimizer.lr = 5e-5  # half of the published rate
train.output_dir = "./output/custom/focus_detr_r50"
