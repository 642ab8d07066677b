"""Inputs for the CUDA kernels on the CPU, and what plain PyTorch in float64 makes of them."""

import torch

from sparse_detr.kernels import reference as plain

SHAPES = [(13, 17), (7, 9), (3, 5)]  # 299 tokens
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def accumulator(dtype):
    return plain.accumulation_dtype(dtype)


def pixel_samples(queries, heads, points, shapes=SHAPES, images=2):
    """Pixel coordinates in and a little around the maps, away from the kinks at whole pixels."""
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    xy = torch.rand(images, queries, heads, len(shapes), points, 2, dtype=torch.float64)
    xy = xy * (size + 3) - 2.0
    return xy.floor() + 0.1 + 0.8 * torch.rand_like(xy), size


def given(dtype, channels, queries=37, heads=3, points=4, shapes=SHAPES):
    pixels, size = pixel_samples(queries, heads, points, shapes)
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(2, tokens, heads, channels, dtype=torch.float64).to(dtype)
    weights = torch.rand(pixels.shape[:-1], dtype=torch.float64).to(accumulator(dtype))
    return value, shapes, ((pixels + 0.5) / size).to(accumulator(dtype)), weights


def fused(dtype, channels, boxes, queries=37, heads=3, points=4, shapes=SHAPES, offset_dtype=None):
    """References and offsets that meet at the pixels of `pixel_samples`."""
    pixels, size = pixel_samples(queries, heads, points, shapes)
    value, *_ = given(dtype, channels, queries, heads, points, shapes)
    location = (pixels + 0.5) / size
    centre = torch.rand(2, queries, len(shapes), 2, dtype=torch.float64)
    offset = location - centre[:, :, None, :, None]
    if boxes:
        box = 0.1 + torch.rand(2, queries, len(shapes), 2, dtype=torch.float64)
        reference = torch.cat([centre, box], dim=-1)
        offset = offset / (box[:, :, None, :, None] * 0.5) * points
    else:
        reference = centre
        offset = offset * size
    logits = torch.randn(2, queries, heads, len(shapes) * points, dtype=torch.float64)
    offset_dtype = offset_dtype or accumulator(dtype)
    return (value, shapes, reference.to(accumulator(dtype)), offset.to(offset_dtype), logits.to(offset_dtype))


def expected_gradients(function, inputs, grad_output):
    """Output and gradients of the plain formula in float64."""
    inputs = [x.double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    output = function(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    leaves = [x for x in inputs if isinstance(x, torch.Tensor)]
    return output.detach(), torch.autograd.grad(output, leaves, grad_output.double())


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert not found.isnan().any()
    error = (found.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


def side_tolerance(dtype):
    """Of gradients of locations, weights, offsets and logits: sums in float32 or float64."""
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, TOLERANCE.get(dtype))


def assert_gradients(found, expected):
    """Of the values first, then of everything else."""
    assert_close(found[0], expected[0], TOLERANCE[found[0].dtype])
    for x, y in zip(found[1:], expected[1:], strict=True):
        assert_close(x, y, side_tolerance(x.dtype))
