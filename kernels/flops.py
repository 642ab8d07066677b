"""FLOPs of the operators, as the papers count them.

A multiply-add counts as one in fvcore and in the papers; `torch.utils.flop_counter` counts two.
One bilinear sample costs 4 multiply-adds per channel (what fvcore counts for `grid_sample`); the
weighting of the samples, the softmax and the location arithmetic are not counted. The key-aware op
is counted as its published formulation: keys and values are sampled each for itself, also where the
values are the keys, plus one product per sample and channel for the score, one for the sum.
"""

from collections import Counter
from collections.abc import Callable
from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import op  # noqa: F401  (registers the operators)


def sampling_macs(value_shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> int:
    """Multiply-adds of bilinear samples.

    Args:
        value_shape: (B, N, M, D).
        sample_shape: (B, Q, M, L, P, ...), one entry per sample.
    """
    return 4 * prod(sample_shape[:5]) * value_shape[3]


def key_aware_macs(value_shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> int:
    """Multiply-adds of key-aware attention, shapes as in `sampling_macs`."""
    samples = prod(sample_shape[:5]) * value_shape[3]
    return 2 * sampling_macs(value_shape, sample_shape) + 2 * samples


def fvcore_handles() -> dict[str, Callable]:
    """Counts for fvcore: `FlopCountAnalysis(model, inputs).set_op_handle(**fvcore_handles())`."""

    def shape(value) -> tuple[int, ...]:  # of a torch._C.Value
        return tuple(value.type().sizes())

    # Under the name that fvcore has for samples, so that plain PyTorch counts the same.
    def attention(inputs, outputs) -> Counter:  # value, shapes, locations | reference, offsets, ...
        return Counter(grid_sampler=sampling_macs(shape(inputs[0]), shape(inputs[3])))

    def key_aware(inputs, outputs) -> Counter:  # query, key, value, shapes, locations
        sizes = shape(inputs[2]), shape(inputs[4])
        sampling = 2 * sampling_macs(*sizes)
        return Counter(grid_sampler=sampling, matmul=key_aware_macs(*sizes) - sampling)

    return {
        "sparse_detr::ms_deform_attn": attention,
        "sparse_detr::ms_deform_attn_fused": attention,
        "sparse_detr::key_aware_deform_attn": key_aware,
    }


def _register() -> None:
    ops = torch.ops.sparse_detr
    if ops.ms_deform_attn in flop_registry:
        return  # this file was imported before under another name

    @register_flop_formula(ops.ms_deform_attn)
    def _(value, shapes, locations, weights, *, out_shape=None):
        return 2 * sampling_macs(value, locations)

    @register_flop_formula(ops.ms_deform_attn_fused)
    def _(value, shapes, reference, offsets, logits, *, out_shape=None):
        return 2 * sampling_macs(value, offsets)

    # The backward samples again for the slopes and spreads the gradient over the same corners.
    @register_flop_formula(ops.ms_deform_attn_backward)
    def _(grad, value, shapes, locations, weights, mask, *, out_shape=None):
        return 4 * sampling_macs(value, locations)

    @register_flop_formula(ops.ms_deform_attn_fused_backward)
    def _(grad, value, shapes, reference, offsets, logits, mask, *, out_shape=None):
        return 4 * sampling_macs(value, offsets)

    @register_flop_formula(ops.key_aware_deform_attn)
    def _(query, key, value, shapes, locations, *, out_shape=None):
        return 2 * key_aware_macs(value, locations)

    @register_flop_formula(ops.key_aware_deform_attn_backward)
    def _(grad, output, lse, query, key, value, shapes, locations, mask, *, out_shape=None):
        return 4 * key_aware_macs(value, locations)


_register()
