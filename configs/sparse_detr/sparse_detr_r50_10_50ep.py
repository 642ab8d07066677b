"""Sparse DETR, R50, keep ratio 10 %: 45.3 AP published (Sparse DETR, Table 1)."""

from .sparse_detr_r50_30_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/sparse_detr_r50_10_50ep"
model.transformer.encoder.keep_ratio = 0.1
