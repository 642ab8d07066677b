"""Salience DETR on DINO, on data of your own on a small machine."""

from sparse_detr.modeling import SalienceDETR

from ..encoders.salience import encoder as _encoder
from ..encoders.salience import fusion as _fusion
from .dino_r50_custom import data, dataloader, lr_multiplier, model, optimizer, train

model._target_ = SalienceDETR
_encoder.num_layers = model.transformer.encoder.num_layers
_encoder.layer_ratios = [1.0, 0.6, 0.3]
_encoder.num_objects = 100
# Box sizes that a level looks for, in pixels of the input: a quarter of those for 800-pixel images.
_encoder.size_ranges = [[-1, 16], [16, 32], [32, 64], [64, 99999]]
model.transformer.encoder = _encoder
model.transformer.fusion = _fusion
model.transformer.query_selection.nms_threshold = 0.3
model.criterion.iou_aware = True

train.output_dir = "./output/quick/salience_detr_r50_custom"
