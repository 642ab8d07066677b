"""A LazyConfig for the data-parallel test: frozen norms, images of one size, no dropout.

In double precision: what rounding makes of sums in another order is then a billion times smaller than
anything that a wrong average does.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from sparse_detr.modeling import DeformableDETR

from .tiny_shapes import data, dataloader, lr_multiplier, model, optimizer, train  # noqa: F401


def in_double(**parts):
    return DeformableDETR(**parts).double()


model._target_ = in_double
model.backbone.stem.norm = "FrozenBN"
for stage in model.backbone.stages:
    stage.norm = "FrozenBN"
for part in (model.transformer.encoder, model.transformer.decoder):
    part.layer.dropout = 0.0
for split in (dataloader.train, dataloader.test):
    split.mapper.augmentations = [L(T.Resize)(shape=[64, 64])]
dataloader.train.total_batch_size = 4
dataloader.test.dataset.num_images = 5  # not the same number for each process

optimizer.lr = 1e-4
train.model_ema.enabled = True
train.max_iter = 3
train.log_period = 1
train.eval_period = 0
