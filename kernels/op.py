"""The operators `torch.ops.sparse_detr.*`: schemas, shapes for tracing, gradients, fallback.

`functional.py` holds the functions for users; this module is what torch.compile, torch.export,
the profiler and the C++ and CUDA sources see. Schemas are registered at import, so graphs can be
traced before anything is compiled. C++ (`csrc/`) adds kernels for the CPU and CUDA dispatch keys
when `build.load_operators()` has built and loaded it; until then, or when that fails, the fallback
registered here computes the same function in plain PyTorch.

`shapes` is flat here: [H0, W0, H1, W1, ...]. Conventions that every kernel keeps:

- value, key and query have one dtype T (float64, float32, bfloat16, float16); outputs and their
  gradients have it too. Arithmetic and sums run in A = float64 for float64, else float32.
- locations and reference have dtype A (16 bits would be worth up to a pixel).
- weights, offsets and logits may have any floating dtype, their gradients have the same.
- `output_mask` tells which gradients are wanted, in the order of the forward's tensor arguments;
  the others come back as empty tensors of shape (0,).
- key = None means that the keys are the values; the gradient of both is then in grad_value and
  grad_key is empty. lse (B, Q, M), dtype A, is log sum_j exp(score_j).
- samples outside the map, and samples with a NaN coordinate, contribute zero and get zero
  gradients (key-aware: they take part in the softmax with score 0); memory outside the sampled
  corners never matters, not even when it holds NaN.
- attention_map_splat rounds each of the four products, computed in float64 as
  ((1-dx) * (1-dy)) * weight, to a multiple of 2**-SPLAT_FRACTION_BITS (half to even) and sums
  int64, so the map is the same to the last bit for any order, device and number of threads. Result
  in dtype A of the weights and locations.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import build, reference

NAMESPACE = "sparse_detr"

SCHEMAS = (
    "ms_deform_attn(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor",
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] shapes, Tensor locations,"
    " Tensor weights, bool[] output_mask)"
    " -> (Tensor grad_value, Tensor grad_locations, Tensor grad_weights)",
    "ms_deform_attn_fused(Tensor value, SymInt[] shapes, Tensor reference, Tensor offsets,"
    " Tensor logits) -> Tensor",
    "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] shapes,"
    " Tensor reference, Tensor offsets, Tensor logits, bool[] output_mask)"
    " -> (Tensor grad_value, Tensor grad_reference, Tensor grad_offsets, Tensor grad_logits)",
    "key_aware_deform_attn(Tensor query, Tensor? key, Tensor value, SymInt[] shapes,"
    " Tensor locations) -> (Tensor output, Tensor lse)",
    "key_aware_deform_attn_backward(Tensor grad_output, Tensor output, Tensor lse, Tensor query,"
    " Tensor? key, Tensor value, SymInt[] shapes, Tensor locations, bool[] output_mask)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_locations)",
    "attention_map_splat(Tensor[] locations, Tensor[] weights, SymInt[] shapes) -> Tensor",
)


def level_pairs(shapes: Sequence[int]) -> list[tuple[int, int]]:
    """[H0, W0, H1, W1, ...] as [(H0, W0), (H1, W1), ...]."""
    return list(zip(shapes[::2], shapes[1::2], strict=True))


# --------------------------------------------------------------------------- shapes for tracing


def _fake_gradients(inputs: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
        for x, wanted in zip(inputs, output_mask, strict=True)
    )


def _fake_ms_deform_attn(value, shapes, locations, weights):
    B, _, M, D = value.shape
    return value.new_empty(B, locations.shape[1], M * D)


def _fake_ms_deform_attn_backward(grad_output, value, shapes, locations, weights, output_mask):
    return _fake_gradients((value, locations, weights), output_mask)


def _fake_fused(value, shapes, reference, offsets, logits):
    B, _, M, D = value.shape
    return value.new_empty(B, offsets.shape[1], M * D)


def _fake_fused_backward(grad_output, value, shapes, reference, offsets, logits, output_mask):
    return _fake_gradients((value, reference, offsets, logits), output_mask)


def _fake_key_aware(query, key, value, shapes, locations):
    B, Q, M, D = query.shape
    dtype = reference.accumulation_dtype(value.dtype)
    return value.new_empty(B, Q, M * D), value.new_empty(B, Q, M, dtype=dtype)


def _fake_key_aware_backward(grad_output, output, lse, query, key, value, shapes, locations, output_mask):
    mask = (output_mask[0], output_mask[1] and key is not None, *output_mask[2:])
    inputs = (query, value if key is None else key, value, locations)
    return _fake_gradients(inputs, mask)


def _fake_splat(locations, weights, shapes):
    B = locations[0].shape[0]
    N = sum(h * w for h, w in level_pairs(shapes))
    dtype = torch.promote_types(locations[0].dtype, weights[0].dtype)
    return locations[0].new_empty(B, N, dtype=reference.accumulation_dtype(dtype))


# --------------------------------------------------------------------------- fallback: plain PyTorch


def _vector_jacobian(
    function: Callable[..., Tensor],
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)`, from inside a kernel, where autograd is switched off."""
    keys = torch._C.DispatchKey
    autocast = torch._C.DispatchKeySet(keys.AutocastCPU) | torch._C.DispatchKeySet(keys.AutocastCUDA)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, autocast), torch.enable_grad():
        leaves = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs, output_mask, strict=True)]
        wanted_leaves = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(function(*leaves), wanted_leaves, grad_output))
    return tuple(
        next(found).contiguous() if wanted else x.new_empty(0)
        for x, wanted in zip(inputs, output_mask, strict=True)
    )


def _plain_ms_deform_attn(value, shapes, locations, weights):
    return reference.ms_deform_attn(value, level_pairs(shapes), locations, weights)


def plain_ms_deform_attn_backward(grad_output, value, shapes, locations, weights, output_mask):
    def forward(value, locations, weights):
        return reference.ms_deform_attn(value, level_pairs(shapes), locations, weights)

    return _vector_jacobian(forward, grad_output, (value, locations, weights), output_mask)


def _plain_fused(value, shapes, reference_, offsets, logits):
    return reference.ms_deform_attn_fused(value, level_pairs(shapes), reference_, offsets, logits)


def _plain_fused_backward(grad_output, value, shapes, reference_, offsets, logits, output_mask):
    def forward(value, reference_, offsets, logits):
        pairs = level_pairs(shapes)
        return reference.ms_deform_attn_fused(value, pairs, reference_, offsets, logits)

    inputs = (value, reference_, offsets, logits)
    return _vector_jacobian(forward, grad_output, inputs, output_mask)


def _plain_key_aware(query, key, value, shapes, locations):
    return reference.key_aware_deform_attn(query, key, value, level_pairs(shapes), locations)


def _plain_key_aware_backward(grad_output, output, lse, query, key, value, shapes, locations, output_mask):
    def forward(query, key, value, locations):
        return reference.key_aware_deform_attn(query, key, value, level_pairs(shapes), locations)[0]

    if key is not None:
        return _vector_jacobian(forward, grad_output, (query, key, value, locations), output_mask)
    mask = (output_mask[0], *output_mask[2:])
    found = _vector_jacobian(
        lambda query, value, locations: forward(query, None, value, locations),
        grad_output,
        (query, value, locations),
        mask,
    )
    return found[0], value.new_empty(0), *found[1:]


def _plain_splat(locations, weights, shapes):
    return reference.attention_map_splat(locations, weights, level_pairs(shapes))


def _fallback(name: str, compute):
    """Kernel for every device: builds and loads the compiled one at first use, else PyTorch."""

    def kernel(*args):
        grad_or_first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        device = grad_or_first.device.type
        if build.load_operators(device):
            # A loaded library takes over from here on; it may still lack this one operator.
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device.upper()):
                return getattr(torch.ops.sparse_detr, name)(*args)
        return compute(*args)

    return kernel


# --------------------------------------------------------------------------- gradients


def _save(*tensors_at: int):
    """`setup_context` that saves the inputs at these positions, and the shapes."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(inputs[i] for i in tensors_at))
        ctx.shapes = inputs[1]

    return setup_context


def _ms_deform_attn_gradients(ctx, grad_output):
    value, locations, weights = ctx.saved_tensors
    need = ctx.needs_input_grad
    mask = [need[0], need[2], need[3]]
    found = torch.ops.sparse_detr.ms_deform_attn_backward(
        grad_output, value, ctx.shapes, locations, weights, mask
    )
    grads = [x if wanted else None for x, wanted in zip(found, mask, strict=True)]
    return grads[0], None, grads[1], grads[2]


def _fused_gradients(ctx, grad_output):
    need = ctx.needs_input_grad
    mask = [need[0], *need[2:5]]
    value, reference_, offsets, logits = ctx.saved_tensors
    found = torch.ops.sparse_detr.ms_deform_attn_fused_backward(
        grad_output, value, ctx.shapes, reference_, offsets, logits, mask
    )
    grads = [x if wanted else None for x, wanted in zip(found, mask, strict=True)]
    return grads[0], None, *grads[1:]


def _save_key_aware(ctx, inputs, output):
    query, key, value, shapes, locations = inputs
    ctx.save_for_backward(*output, query, key, value, locations)
    ctx.shapes = shapes
    ctx.mark_non_differentiable(output[1])


def _key_aware_gradients(ctx, grad_output, _grad_lse):
    output, lse, query, key, value, locations = ctx.saved_tensors
    need = ctx.needs_input_grad
    mask = [need[0], need[1] and key is not None, need[2], need[4]]
    found = torch.ops.sparse_detr.key_aware_deform_attn_backward(
        grad_output, output, lse, query, key, value, ctx.shapes, locations, mask
    )
    grads = [x if wanted else None for x, wanted in zip(found, mask, strict=True)]
    return grads[0], grads[1], grads[2], None, grads[3]


def _refuse_second_order(ctx, *grads):
    raise NotImplementedError(
        "deformable attention is differentiable once: the gradient of a gradient is only available "
        "from the plain PyTorch path (set SPARSE_DETR_OPS=reference before the first call, or compute "
        'it within sparse_detr.kernels.implementation("reference"))'
    )


def _register() -> torch.library.Library | None:
    if hasattr(getattr(torch.ops, NAMESPACE), "ms_deform_attn"):
        return None  # this file was imported before under another name
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    kernels: dict[str, tuple[Callable, Callable]] = {
        "ms_deform_attn": (_plain_ms_deform_attn, _fake_ms_deform_attn),
        "ms_deform_attn_backward": (plain_ms_deform_attn_backward, _fake_ms_deform_attn_backward),
        "ms_deform_attn_fused": (_plain_fused, _fake_fused),
        "ms_deform_attn_fused_backward": (_plain_fused_backward, _fake_fused_backward),
        "key_aware_deform_attn": (_plain_key_aware, _fake_key_aware),
        "key_aware_deform_attn_backward": (_plain_key_aware_backward, _fake_key_aware_backward),
        "attention_map_splat": (_plain_splat, _fake_splat),
    }
    gradients: dict[str, tuple[Callable, Callable | None]] = {
        "ms_deform_attn": (_ms_deform_attn_gradients, _save(0, 2, 3)),
        "ms_deform_attn_fused": (_fused_gradients, _save(0, 2, 3, 4)),
        "key_aware_deform_attn": (_key_aware_gradients, _save_key_aware),
        "ms_deform_attn_backward": (_refuse_second_order, None),
        "ms_deform_attn_fused_backward": (_refuse_second_order, None),
        "key_aware_deform_attn_backward": (_refuse_second_order, None),
    }
    for schema in SCHEMAS:
        library.define(schema)
    for name, (plain, fake) in kernels.items():
        library.impl(name, _fallback(name, plain), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    for name, (backward, setup_context) in gradients.items():
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library
        )
    return library


_LIBRARY = _register()
