"""Sparse DETR, Swin-T, keep ratio 50 %: 49.3 AP published (Sparse DETR, Table 1)."""

from .sparse_detr_swint_30_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/sparse_detr_swint_50_50ep"
model.transformer.encoder.keep_ratio = 0.5
