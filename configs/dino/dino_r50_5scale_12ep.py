"""DINO 5-scale, R50, 12 epochs: 49.6 AP published (detrex)."""

from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/dino_r50_5scale_12ep"
model.transformer.num_levels = 5
model.in_features = ["res2", "res3", "res4", "res5"]
model.backbone.out_features = ["res2", "res3", "res4", "res5"]
model.neck.in_channels = [256, 512, 1024, 2048]
