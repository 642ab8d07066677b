"""The detector of ``tiny_shapes`` on data of one's own: classes from the JSON."""

from ...configs.common.data.custom import data, dataloader  # noqa: F401
from .tiny_shapes import dataloader as _tiny
from .tiny_shapes import lr_multiplier, model, optimizer, train  # noqa: F401

model.num_classes = None
for split in ("train", "test"):
    dataloader[split].mapper = _tiny[split].mapper
    dataloader[split].num_workers = 0
dataloader.train.total_batch_size = 2
train.max_iter = 2
train.log_period = 1
