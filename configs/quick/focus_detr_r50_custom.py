"""Focus-DETR on DINO, keep ratio 50 %, on data of your own on a small machine."""

from sparse_detr.modeling import FocusDETR

from ..encoders.focus import encoder as _encoder
from .dino_r50_custom import data, dataloader, lr_multiplier, model, optimizer, train

model._target_ = FocusDETR
_encoder.num_layers = model.transformer.encoder.num_layers
_encoder.layer_ratios = [1.0, 0.6, 0.3]
_encoder.num_objects = 100
# Box sizes that a level looks for, in pixels of the input: a quarter of those for 800-pixel images.
_encoder.size_ranges = [[-1, 16], [16, 32], [32, 64], [64, 999999]]
model.transformer.encoder = _encoder

train.output_dir = "./output/quick/focus_detr_r50_custom"
