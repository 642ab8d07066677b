"""Two-stage Deformable DETR, R50: 46.9 AP published (batch 32)."""

from ..models.deformable_detr_two_stage import model
from .deformable_detr_r50_50ep import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/deformable_detr_r50_two_stage_50ep"
