"""RT-DETR, R101-D, 72 epochs of 640x640 pixels: 54.3 AP published.

Neck and encoder have 384 channels, of which the pyramid's last convolutions make the decoder's 256.
"""

from .rt_detr_r50_72ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = (
    "https://github.com/lyuwenyu/storage/releases/download/v0.1/ResNet101_vd_ssld_pretrained_from_paddle.pth"
)
train.output_dir = "./output/rt_detr_r101_72ep"
# The authors' file for R101 has this rule alone: norms and biases decay as all weights do.
optimizer.params.lr_factor_func.rules = {"backbone": 0.01}
optimizer.params.weight_decay_norm = None
optimizer.params.weight_decay_bias = None
optimizer.params.overrides = None
model.backbone.depth = 101
model.neck.embed_dim = 384
model.transformer.position.embed_dim = 384
model.transformer.encoder.layer.update(embed_dim=384, ffn_dim=2048)
model.transformer.encoder.fusion.update(embed_dim=384, output_dim="${model.transformer.embed_dim}")
