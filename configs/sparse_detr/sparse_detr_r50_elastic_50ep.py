"""Sparse DETR, R50, one model for every keep ratio from 5 to 100 % (docs/elastic.md).

Inference keeps 30 % unless told otherwise: model.transformer.encoder.keep_ratio=0.1.
"""

from .sparse_detr_r50_30_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/sparse_detr_r50_elastic_50ep"
model.transformer.encoder.elastic = [0.05, 1.0]
