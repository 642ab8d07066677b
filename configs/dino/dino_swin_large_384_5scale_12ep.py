"""DINO 5-scale, Swin-L of ImageNet-22k, 12 epochs: 57.5 AP published (detrex)."""

from .dino_swin_large_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/dino_swin_large_384_5scale_12ep"
model.transformer.num_levels = 5
model.in_features = ["p0", "p1", "p2", "p3"]
model.backbone.out_indices = [0, 1, 2, 3]
model.neck.in_channels = [192, 384, 768, 1536]
