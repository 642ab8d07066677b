"""Salience DETR: DINO with the encoder of ``encoders/salience``, a fusion neck and what goes with them."""

from sparse_detr.modeling import SalienceDETR

from ..encoders.salience import encoder, fusion
from .dino import model

model._target_ = SalienceDETR
model.neck.bias = False
model.size_divisibility = 32
model.transformer.encoder = encoder
model.transformer.fusion = fusion
model.transformer.query_selection.nms_threshold = 0.3
model.criterion.update(iou_aware=True, giou_eps=0.0)
model.criterion.matcher.update(giou_eps=0.0, focal_eps=1e-6)
model.backbone.freeze_at = 2
