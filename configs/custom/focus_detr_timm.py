"""Focus-DETR with a backbone of timm, on data of your own.

    python train_net.py --config-file configs/custom/focus_detr_timm.py model.backbone.name=resnet18 \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=...

Starts from the backbone's ImageNet weights: train longer than from a detector (docs/own_data.md). Needs
the package timm; see docs/backbones.md.
"""

from ..common.fine_tune import data, dataloader, lr_multiplier, train
from ..focus_detr.focus_detr_timm_4scale_12ep import model, optimizer

model.num_classes = None  # read from data.train_json
model.exact_sizes = True
optimizer.lr = 5e-5  # half of the published rate
train.init_checkpoint = "timm://${model.backbone.name}"  # ImageNet weights
train.output_dir = "./output/custom/focus_detr_timm"
