"""Sparse DETR, R50, keep ratio 20 %: 45.6 AP published (Sparse DETR, Table 1)."""

from .sparse_detr_r50_30_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/sparse_detr_r50_20_50ep"
model.transformer.encoder.keep_ratio = 0.2
