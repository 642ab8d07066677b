"""DINO 4-scale, Swin-S of ImageNet-22k, 12 epochs: 54.5 AP published (detrex)."""

from .dino_swin_small_224_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "./weights/swin_small_patch4_window7_224_22kto1k_finetune.pth"
train.output_dir = "./output/dino_swin_small_224_22k_4scale_12ep"
