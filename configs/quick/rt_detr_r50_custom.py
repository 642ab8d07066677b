"""RT-DETR on data of your own on a small machine, at 256x256 pixels; budget of deformable_detr_r50_custom.

The backbone takes detectron2's own (MSRA) ImageNet weights, as the other quick configs do, and their frozen
norms; images are squares and need no exact sizes.
"""

from ..common.data.squares import test_augmentations as _test
from ..common.data.squares import train_augmentations as _train
from ..models.backbones import msra_input, resnet50_msra
from ..models.rt_detr import model
from .deformable_detr_r50_custom import data, dataloader, lr_multiplier, optimizer, train

model.backbone = resnet50_msra.backbone
model.num_classes = None  # read from the annotations
model.update(msra_input)
model.transformer.decoder.num_layers = 3
model.transformer.query_selection.num_queries = 100
model.max_detections = 100

dataloader.train.mapper.augmentations = _train
dataloader.test.mapper.augmentations = _test
dataloader.train.mapper.augmentations.size = 256
dataloader.test.mapper.augmentations.size = 256
train.output_dir = "./output/quick/rt_detr_r50_custom"
