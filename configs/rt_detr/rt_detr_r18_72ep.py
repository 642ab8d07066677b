"""RT-DETR, R18-D, 72 epochs of 640x640 pixels: 46.4 AP published.

Half as many channels inside the encoder's pyramid, three decoder layers; the backbone is trained whole, its
norms too.
"""

from ..models.backbones import resnet18_d as _backbone
from .rt_detr_r50_72ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = (
    "https://github.com/lyuwenyu/storage/releases/download/v0.1/ResNet18_vd_pretrained_from_paddle.pth"
)
train.output_dir = "./output/rt_detr_r18_72ep"
model.backbone = _backbone.backbone
model.backbone.norm = "SyncBN"
model.neck.in_channels = _backbone.in_channels
model.transformer.encoder.fusion.expansion = 0.5
model.transformer.decoder.num_layers = 3
