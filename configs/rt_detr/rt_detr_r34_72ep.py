"""RT-DETR, R34-D, 72 epochs of 640x640 pixels: 48.9 AP published. As R18, with four decoder layers."""

from .rt_detr_r18_72ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = (
    "https://github.com/lyuwenyu/storage/releases/download/v0.1/ResNet34_vd_pretrained_from_paddle.pth"
)
train.output_dir = "./output/rt_detr_r34_72ep"
model.backbone.depth = 34
model.transformer.decoder.num_layers = 4
