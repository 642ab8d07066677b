"""Deformable DETR with iterative bounding box refinement, R50: 46.2 AP published (batch 32)."""

from .deformable_detr_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/deformable_detr_r50_refine_50ep"
model.transformer.decoder.refine = True
model.transformer.heads.share = False
