"""RT-DETR: the DINO base with the encoder of ``encoders/rt_detr`` and what else is its own.

Three levels, batch norms in neck and encoder, position codes of cells that are counted, no level
embedding; queries start from the chosen tokens themselves, a query's position is an MLP of its box, and
class scores learn the IoU ("uncertainty-minimal query selection", the paper's Sec. 4.3, is that loss). Images
are divided by 255 and nothing else. All of these are options that any model may have.
"""

from sparse_detr.modeling import RTDETR

from ..encoders.rt_detr import encoder
from .backbones import resnet50_d
from .dino import model

model._target_ = RTDETR
model.backbone = resnet50_d.backbone
model.in_features = resnet50_d.in_features
model.neck.in_channels = resnet50_d.in_channels
model.neck.update(bias=False, norm="BN")
model.pixel_mean = [0.0, 0.0, 0.0]
model.pixel_std = [255.0, 255.0, 255.0]
model.pad_features = False  # images of one size have no padding

encoder.fusion.project = True
model.transformer.update(num_levels=3, level_embed=False, encoder=encoder)
model.transformer.position.update(offset=-1.0, normalize=False, interleaved=False)
model.transformer.query_selection.update(num_queries=300, learned_content=False)
model.transformer.denoising.update(flavour="official", eps=1e-5)
model.transformer.decoder.update(norm=False, sine_code=False, eps=1e-5)
model.transformer.decoder.layer.ffn_dim = 1024
model.criterion.update(iou_aware=True, giou_eps=0.0)
model.criterion.matcher.giou_eps = 0.0
