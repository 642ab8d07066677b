"""Focus-DETR, R50, 12 epochs: 48.8 AP published (keep ratio 0.5, the released models').

The recipe the other Focus-DETR configs start from. The paper's compute is that of
model.transformer.encoder.keep_ratio=0.3.
"""

from sparse_detr.modeling import FocusDETR

from ..dino.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train
from ..encoders.focus import encoder as _encoder

train.output_dir = "./output/focus_detr_r50_4scale_12ep"
model._target_ = FocusDETR
model.transformer.encoder = _encoder
# The authors' repository flips and resizes but never crops; detrex's version of it does (0.5).
dataloader.train.mapper.augmentations.crop_prob = 0.0
