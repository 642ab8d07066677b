"""Multi-scale deformable attention in plain PyTorch: the oracle for the compiled kernels and the
path that works everywhere (any device, any dtype, ONNX export, differentiable to any order).

Sources: Deformable DETR (arXiv 2010.04159) eq. 3; Lite DETR (arXiv 2303.07335) section 3.4 for the
key-aware form; Sparse DETR (arXiv 2111.14330) section 3.3 for the decoder attention map.

Letters: B images, N tokens of all levels, Q queries, M heads, D channels per head, L levels,
P points. `shapes` holds (H, W) of each level as Python ints; tokens are row-major inside a level,
levels in the order of `shapes`. Inputs are taken as valid: `functional.py` checks them.

A location (x, y) is normalised to the level: x = 0 is the left edge of the first column, x = 1 the
right edge of the last one, so the pixel coordinate (0 at the centre of the first pixel) is
x * W - 0.5. Sampling is bilinear and zero outside the map. A NaN coordinate counts as outside.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# The splat adds integers, so that the sum does not depend on the order of its terms. One unit is
# 2**-38 = 3.6e-12; a cell may collect a weight of 1.6e7 before the int64 sum overflows. The same
# number stands in csrc/splat_units.h for the compiled operators.
SPLAT_FRACTION_BITS = 38


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over samples run: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def level_sizes(shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """(L, 2) cells per level as (w, h), in the dtype and on the device of `like`."""
    # A flat list: the export tracer keeps symbolic sizes in it, but not in nested ones.
    flat = [size for height, width in shapes for size in (width, height)]
    # Copied without waiting for the device, which torch.tensor(..., device=...) does.
    return torch.tensor(flat, dtype=like.dtype).view(-1, 2).to(like.device, non_blocking=True)


def sampling_locations(reference: Tensor, offsets: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Normalised locations from references and offsets.

    Args:
        reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes (cx, cy, w, h), in [0, 1] of the maps.
        offsets: (B, Q, M, L, P, 2): in cells of the level for points, in half box sizes over P for
            boxes.

    Returns:
        (B, Q, M, L, P, 2), at least float32.
    """
    dtype = torch.promote_types(reference.dtype, torch.float32)
    points = offsets.shape[-2]

    def of_points(x: Tensor) -> Tensor:  # (..., L, 2) -> (..., L, P * 2): long rows, for speed
        return x[..., None, :].expand(*x.shape[:-1], points, 2).flatten(-2)

    rows = offsets.to(dtype).flatten(-2)  # (B, Q, M, L, P * 2)
    reference = reference.to(dtype)[:, :, None]  # (B, Q, 1, L, 2 or 4)
    if reference.shape[-1] == 2:
        sizes = level_sizes(shapes, reference)  # (L, 2)
        locations = torch.addcdiv(of_points(reference), rows, of_points(sizes))
    else:
        centre, size = reference.split(2, dim=-1)
        locations = torch.addcmul(of_points(centre), rows, of_points(size / max(2 * points, 1)))
    return locations.unflatten(-1, (points, 2))


def sample_levels(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor) -> Tensor:
    """Bilinear samples (B*M, D, Q, L*P) of value (B, N, M, D) at locations (B, Q, M, L, P, 2)."""
    B, _, M, D = value.shape
    Q = locations.shape[1]
    # Far, infinite and NaN coordinates become a finite place outside: grid_sample would multiply
    # the zero padding by a non-finite bilinear weight. [-1, 2] is outside for every level size.
    locations = locations.to(value.dtype).nan_to_num(nan=-1.0).clamp(-1.0, 2.0)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P, 2)
    samples = []
    levels = value.split([h * w for h, w in shapes], dim=1)
    for level, (level_value, (h, w)) in enumerate(zip(levels, shapes, strict=True)):
        level_map = level_value.permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        if Q == 0 or B == 0:  # grid_sample rejects empty inputs
            # (B*M, D, Q, P) without an element, but with a gradient for both inputs
            samples.append(level_map.sum((2, 3))[..., None, None] * grids[:, None, :, level, :, 0])
            continue
        samples.append(
            F.grid_sample(
                level_map, grids[:, :, level], "bilinear", "zeros", align_corners=False
            )  # (B*M, D, Q, P)
        )
    return torch.stack(samples, dim=-2).flatten(-2)  # (B*M, D, Q, L*P)


def ms_deform_attn(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """sum_{l,p} weights * value sampled at locations; see `kernels.ms_deform_attn`."""
    B, _, M, D = value.shape
    Q = locations.shape[1]
    samples = sample_levels(value.to(accumulation_dtype(value.dtype)), shapes, locations)
    weights = weights.to(samples.dtype).transpose(1, 2).flatten(3).flatten(0, 1)  # (B*M, Q, L*P)
    output = (samples * weights[:, None]).sum(-1)  # (B*M, D, Q)
    return output.view(B, M * D, Q).transpose(1, 2).to(value.dtype).contiguous()


def ms_deform_attn_fused(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    """Softmax and location arithmetic around `ms_deform_attn`; see `kernels.ms_deform_attn_fused`."""
    locations = sampling_locations(reference, offsets, shapes)
    weights = logits.to(accumulation_dtype(value.dtype)).softmax(-1)
    return ms_deform_attn(value, shapes, locations, weights.view(locations.shape[:-1]))


def key_aware_deform_attn(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output (B, Q, M*D) and log-sum-exp of the scores (B, Q, M); see `kernels.key_aware_deform_attn`.

    A sample outside the map has a zero key, hence score 0 (not minus infinity): it takes its part
    of the softmax, as in the published code.
    """
    B, _, M, D = value.shape
    Q = locations.shape[1]
    dtype = accumulation_dtype(value.dtype)
    values = sample_levels(value.to(dtype), shapes, locations)  # (B*M, D, Q, L*P)
    keys = values if key is None else sample_levels(key.to(dtype), shapes, locations)
    query = query.to(dtype).permute(0, 2, 3, 1).reshape(B * M, D, Q, 1)
    scores = (query * keys).sum(1) * D**-0.5  # (B*M, Q, L*P)
    output = (values * scores.softmax(-1)[:, None]).sum(-1)  # (B*M, D, Q)
    output = output.view(B, M * D, Q).transpose(1, 2).to(value.dtype).contiguous()
    return output, scores.logsumexp(-1).view(B, M, Q).transpose(1, 2).contiguous()


@torch.no_grad()
def attention_map_splat(
    locations: Sequence[Tensor], weights: Sequence[Tensor], shapes: Sequence[tuple[int, int]]
) -> Tensor:
    """Map (B, N) of the attention that each token receives; see `kernels.attention_map_splat`.

    Products run in float64 and sums in 64-bit fixed point, so the result does not depend on the
    order of the samples and is the same to the last bit on every device and in every backend.
    """
    B = locations[0].shape[0]
    device = locations[0].device
    tokens = sum(h * w for h, w in shapes)
    fixed = torch.zeros(B, tokens, dtype=torch.int64, device=device)
    dtype = accumulation_dtype(torch.promote_types(locations[0].dtype, weights[0].dtype))
    for layer_locations, layer_weights in zip(locations, weights, strict=True):
        start = 0
        for level, (h, w) in enumerate(shapes):
            xy = layer_locations[:, :, :, level].double().reshape(B, -1, 2)  # (B, Q*M*P, 2)
            share = layer_weights[:, :, :, level].double().reshape(B, -1)  # (B, Q*M*P)
            x, y = xy[..., 0] * w, xy[..., 1] * h  # paper: no half-pixel shift here
            near = (x >= -1) & (x < w) & (y >= -1) & (y < h)  # False for NaN
            x, y = torch.where(near, x, -1.0), torch.where(near, y, -1.0)
            column, row = x.floor(), y.floor()
            dx, dy = x - column, y - row
            for step_y, part_y in ((0, 1 - dy), (1, dy)):
                for step_x, part_x in ((0, 1 - dx), (1, dx)):
                    c, r = column.long() + step_x, row.long() + step_y
                    inside = near & (c >= 0) & (c < w) & (r >= 0) & (r < h)
                    part = torch.where(inside, part_x * part_y * share, 0.0)
                    units = (part * 2.0**SPLAT_FRACTION_BITS).round().long()
                    token = torch.where(inside, start + r * w + c, 0)
                    fixed.scatter_add_(1, token, units)
            start += h * w
    return (fixed.double() * 2.0**-SPLAT_FRACTION_BITS).to(dtype)
