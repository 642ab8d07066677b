"""Sparse DETR, Swin-T, keep ratio 10 %: 48.2 AP published (Sparse DETR, Table 1)."""

from .sparse_detr_swint_30_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/sparse_detr_swint_10_50ep"
model.transformer.encoder.keep_ratio = 0.1
