"""DINO 4-scale, R50, 12 epochs with 300 denoising queries: 49.5 AP published (detrex)."""

from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/dino_r50_4scale_12ep_300dn"
model.transformer.denoising.num_queries = 300
