"""The functions for users: argument checks, autocast rule, compiled op or plain PyTorch.

Letters: B images, N tokens of all levels, Q queries, M heads, D channels per head, L levels,
P points. `reference.py` states the semantics in code, `README.md` in formulas. The compiled op is
built at the first call with real tensors (`build.py`); tracing needs no build.

Autocast: value, key and query follow the autocast dtype, locations and reference become float32,
weights, offsets and logits keep the dtype they come in.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import build, flops, op  # noqa: F401  (registers torch.ops.sparse_detr and their FLOPs)
from . import reference as plain

Shapes = Sequence[tuple[int, int]]


def ms_deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3) per head.

    Args:
        value: (B, N, M, D) projected tokens, padded ones zeroed; float64, float32, bfloat16 or
            float16.
        shapes: (H, W) of each level as Python ints, in token order; the sum of H * W must be N.
        locations: (B, Q, M, L, P, 2) sampling locations (x, y), normalised to the level: 0 is the
            left (top) edge of the map, 1 its right (bottom) edge. Zero is sampled outside and at
            NaN. float32, or float64 beside a float64 value.
        weights: (B, Q, M, L, P) attention weights, any floating dtype.

    Returns:
        (B, Q, M * D), dtype of `value`; sums run in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; on CUDA also for more than 8 levels
            or 2048 samples L * P.
    """
    (value,), (locations,) = _autocast((value,), (locations,))
    _check_value("value", value, shapes)
    _check("locations", locations, (value.shape[0], None, value.shape[2], len(shapes), None, 2), value)
    _check_precision("locations", locations, value)
    _check("weights", weights, locations.shape[:-1], value)
    if build.is_unavailable(value.device.type):
        return plain.ms_deform_attn(value, shapes, locations, weights)
    return torch.ops.sparse_detr.ms_deform_attn(value, _flat(shapes), locations, weights)


def ms_deform_attn_fused(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """`ms_deform_attn` with the softmax over all L * P samples and the location arithmetic inside.

    A point reference gives `location = reference + offset / (W, H)`, a box reference
    `location = centre + offset / P * size * 0.5`. Keeps only offsets and logits for the backward.

    Args:
        value, shapes: as in `ms_deform_attn`.
        reference: (B, Q, L, 2) points (x, y) or (B, Q, L, 4) boxes (cx, cy, w, h), normalised to
            the padded map of each level. float32, or float64 beside a float64 value.
        offsets: (B, Q, M, L, P, 2) sampling offsets (x, y): pixels of the level for points, units
            of half the box over P for boxes. Any floating dtype.
        logits: (B, Q, M, L * P) attention logits, any floating dtype.

    Returns:
        (B, Q, M * D), dtype of `value`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    (value,), (reference,) = _autocast((value,), (reference,))
    _check_value("value", value, shapes)
    B, _, M, _ = value.shape
    L = len(shapes)
    _check("offsets", offsets, (B, None, M, L, None, 2), value)
    Q, P = offsets.shape[1], offsets.shape[4]
    _check("reference", reference, (B, Q, L, None), value)
    if reference.shape[-1] not in (2, 4):
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}: the last dimension must be 2 (point x, y) "
            "or 4 (box cx, cy, w, h)"
        )
    _check_precision("reference", reference, value)
    _check("logits", logits, (B, Q, M, L * P), value)
    if build.is_unavailable(value.device.type):
        return plain.ms_deform_attn_fused(value, shapes, reference, offsets, logits)
    return torch.ops.sparse_detr.ms_deform_attn_fused(value, _flat(shapes), reference, offsets, logits)


def key_aware_deform_attn(
    query: Tensor, key: Tensor | None, value: Tensor, shapes: Shapes, locations: Tensor
) -> Tensor:
    """Key-aware deformable attention (Lite DETR, arXiv 2303.07335, section 3.4) per head.

    Scores are `<query, sampled key> / sqrt(D)`, weights their softmax over all L * P samples. A
    sample outside the map has score 0 and value 0 and takes part in the softmax. Scores and softmax
    run in float32 (float64 for float64); no per-sample tensor is kept for the backward.

    Args:
        query: (B, Q, M, D) projected queries.
        key: (B, N, M, D) projected keys, padded ones zeroed, or None when the values are the keys.
        value, shapes, locations: as in `ms_deform_attn`; query, key and value share one dtype.

    Returns:
        (B, Q, M * D), dtype of `value`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    (query, key, value), (locations,) = _autocast((query, key, value), (locations,))
    _check_value("value", value, shapes)
    B, _, M, D = value.shape
    _check("query", query, (B, None, M, D), value)
    _check_same_dtype("query", query, value)
    if key is not None:
        _check("key", key, value.shape, value)
        _check_same_dtype("key", key, value)
    _check("locations", locations, (B, query.shape[1], M, len(shapes), None, 2), value)
    _check_precision("locations", locations, value)
    if build.is_unavailable(value.device.type):
        return plain.key_aware_deform_attn(query, key, value, shapes, locations)[0]
    return torch.ops.sparse_detr.key_aware_deform_attn(query, key, value, _flat(shapes), locations)[0]


@torch.no_grad()
def key_aware_weights(query: Tensor, key: Tensor, shapes: Shapes, locations: Tensor) -> Tensor:
    """The attention weights of `key_aware_deform_attn`, which it uses and does not keep.

    A score is what a sample's weight changes in `ms_deform_attn`'s output, projected on the query:
    that op's backward computes all of them without sampled keys in memory. Without gradient.

    Args:
        query, shapes, locations: as in `key_aware_deform_attn`.
        key: (B, N, M, D) projected keys, or values where they are the keys.

    Returns:
        (B, Q, M, L, P), float32 (float64 for float64), softmax over L * P.
    """
    (query, key), (locations,) = _autocast((query, key), (locations,))
    _check_value("key", key, shapes)
    B, _, M, D = key.shape
    _check("query", query, (B, None, M, D), key)
    _check("locations", locations, (B, query.shape[1], M, len(shapes), None, 2), key)
    _check_precision("locations", locations, key)
    weights = locations.new_ones(locations.shape[:-1])
    only_weights = [False, False, True]
    backward: Callable[..., tuple[Tensor, ...]] = torch.ops.sparse_detr.ms_deform_attn_backward
    if build.is_unavailable(key.device.type):
        backward = op.plain_ms_deform_attn_backward
    _, _, scores = backward(
        query.flatten(2).to(key.dtype), key, _flat(shapes), locations, weights, only_weights
    )
    return (scores * D**-0.5).flatten(-2).softmax(-1).view_as(scores)


def attention_map_splat(
    locations: Tensor | Sequence[Tensor], weights: Tensor | Sequence[Tensor], shapes: Shapes
) -> Tensor:
    """How much attention each token receives (Sparse DETR, arXiv 2111.14330, section 3.3).

    Spreads every attention weight over the four tokens around its sampling location and sums over
    layers, queries, heads and points. Column = x * W and row = y * H, without the half-pixel shift
    of the attention itself; corners outside the map are dropped. The map is a target: it carries no
    gradient. It is the same to the last bit for any order of samples, device and thread count, so
    that a top-k over it is reproducible.

    Args:
        locations: (B, Q, M, L, P, 2), or one such tensor per layer (Q may differ); float32 or float64,
            the same for all layers.
        weights: (B, Q, M, L, P) softmax weights, or one such tensor per layer; the weights that
            one token collects must sum to less than 1.6e7.
        shapes: (H, W) of each level as Python ints, in token order.

    Returns:
        (B, N), float64 if locations or weights are, else float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    locations = [locations] if isinstance(locations, Tensor) else list(locations)
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if len(locations) != len(weights) or not locations:
        raise ValueError(
            f"got {len(locations)} location tensors and {len(weights)} weight tensors: expected one "
            "of each per layer, at least one layer"
        )
    _check_shapes(shapes)
    first = locations[0]
    for layer, (layer_locations, layer_weights) in enumerate(zip(locations, weights, strict=True)):
        expected = (first.shape[0], None, None, len(shapes), None, 2)
        _check(f"locations[{layer}]", layer_locations, expected, first)
        _check(f"weights[{layer}]", layer_weights, layer_locations.shape[:-1], first)
        if layer_locations.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"locations[{layer}] has dtype {layer_locations.dtype}: expected float32 or float64"
            )
        for name, tensor, like in (
            ("locations", layer_locations, first),
            ("weights", layer_weights, weights[0]),
        ):
            if tensor.dtype != like.dtype:
                raise ValueError(
                    f"{name}[{layer}] has dtype {tensor.dtype}, {name}[0] has {like.dtype}: expected "
                    "one dtype for all layers"
                )
    locations = [x.detach() for x in locations]
    weights = [x.detach() for x in weights]
    if build.is_unavailable(first.device.type):
        return plain.attention_map_splat(locations, weights, shapes)
    return torch.ops.sparse_detr.attention_map_splat(locations, weights, _flat(shapes))


# --------------------------------------------------------------------------- checks


def _flat(shapes: Shapes) -> list[int]:
    # Under torch.jit.trace the sizes of tensors are tensors, which the schema does not take.
    return [int(x) if isinstance(x, Tensor) else x for shape in shapes for x in shape]


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device, None when autocast is off."""
    if device_type not in ("cpu", "cuda"):
        return None
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _autocast(values: tuple, precise: tuple) -> tuple[tuple, tuple]:
    """Casts `values` to the autocast dtype and `precise` to float32; float64 stays float64."""
    dtype = _autocast_dtype(values[0].device.type)
    if dtype is None:
        return values, precise

    def cast(x, to):
        return x if x is None or x.dtype == torch.float64 else x.to(to)

    return tuple(cast(x, dtype) for x in values), tuple(cast(x, torch.float32) for x in precise)


def _check_shapes(shapes: Shapes) -> None:
    if len(shapes) == 0 or any(len(shape) != 2 or shape[0] < 1 or shape[1] < 1 for shape in shapes):
        raise ValueError(f"shapes is {shapes}: expected one (H, W) of positive ints per level")


def _check_value(name: str, value: Tensor, shapes: Shapes) -> None:
    _check_shapes(shapes)
    if value.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected (B, N, M, D)")
    tokens = sum(h * w for h, w in shapes)
    if value.shape[1] != tokens:
        raise ValueError(
            f"{name} has N = {value.shape[1]} tokens (shape {tuple(value.shape)}), but the levels "
            f"{tuple(shapes)} have {tokens}: pass the (H, W) of every level that {name} holds"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} has dtype {value.dtype}: expected a floating dtype")


def _check(name: str, tensor: Tensor, expected: Sequence[int | None], value: Tensor) -> None:
    """Shape (None = any size), floating dtype, and the device of `value`."""
    sizes = tensor.shape
    if len(sizes) != len(expected) or any(
        e is not None and s != e for s, e in zip(sizes, expected, strict=True)
    ):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} has shape {tuple(sizes)}: expected ({wanted})")
    if tensor.device != value.device:
        raise ValueError(f"{name} is on {tensor.device}: expected {value.device} like the others")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}: expected a floating dtype")


def _check_precision(name: str, tensor: Tensor, value: Tensor) -> None:
    expected = plain.accumulation_dtype(value.dtype)
    if tensor.dtype != expected:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}: expected {expected} beside values of dtype "
            f"{value.dtype} (16 bits would move samples by up to a pixel); cast it with .to({expected})"
        )


def _check_same_dtype(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.dtype != value.dtype:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, value has {value.dtype}: expected one dtype for both"
        )
