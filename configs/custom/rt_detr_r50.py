"""RT-DETR, R50-D, fine-tuned on data of your own, at 640x640 pixels.

    python train_net.py --config-file configs/custom/rt_detr_r50.py \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=... \\
        train.init_checkpoint=published

``train.init_checkpoint``: ``published`` for the authors' checkpoint, transformers' copy of it
(``hf://PekingU/rtdetr_r50vd``), one of your own, or nothing to start from an ImageNet backbone. Another
size, a multiple of 32:
dataloader.train.mapper.augmentations.size=512 dataloader.test.mapper.augmentations.size=512. One for each
batch, as in the published training: dataloader.train.mapper.augmentations.sizes=[576,640,704].
"""

from ..common.data.squares import test_augmentations as _test
from ..common.data.squares import train_augmentations as _train
from ..common.fine_tune import data, dataloader, lr_multiplier, train
from ..rt_detr.rt_detr_r50_72ep import model, optimizer
from ..rt_detr.rt_detr_r50_72ep import train as _published

model.num_classes = None  # read from data.train_json
dataloader.train.mapper.augmentations = _train
dataloader.test.mapper.augmentations = _test
optimizer.lr = 5e-5  # half of the published rate
train.init_checkpoint = _published.init_checkpoint
train.model_ema = _published.model_ema
train.model_ema.update(decay=0.9997)
train.output_dir = "./output/custom/rt_detr_r50"
