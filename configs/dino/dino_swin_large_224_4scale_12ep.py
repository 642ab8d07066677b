"""DINO 4-scale, Swin-L at 224 pixels, 12 epochs: 56.9 AP published (detrex)."""

from .dino_swin_large_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "./weights/swin_large_patch4_window7_224_22kto1k.pth"
train.output_dir = "./output/dino_swin_large_224_4scale_12ep"
model.backbone.window_size = 7
model.backbone.pretrain_img_size = 224
