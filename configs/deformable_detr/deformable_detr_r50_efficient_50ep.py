"""Deformable DETR + top-k & box refinement, R50: 46.0 AP published (Sparse DETR, Table 1).

The dense base that Sparse DETR is compared with: queries start from the chosen tokens.
"""

from ..models.deformable_detr_two_stage import efficient as model
from .deformable_detr_r50_50ep import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/deformable_detr_r50_efficient_50ep"
dataloader.train.total_batch_size = 16
