"""Deformable attention operators: plain PyTorch, C++ for the CPU, CUDA. See README.md."""

from .build import Status, implementation, status
from .flops import fvcore_handles
from .functional import (
    attention_map_splat,
    key_aware_deform_attn,
    key_aware_weights,
    ms_deform_attn,
    ms_deform_attn_fused,
)
from .reference import level_sizes, sampling_locations

__all__ = [
    "Status",
    "attention_map_splat",
    "fvcore_handles",
    "implementation",
    "key_aware_deform_attn",
    "key_aware_weights",
    "level_sizes",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "sampling_locations",
    "status",
]
