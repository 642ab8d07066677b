"""The backward that sums per block before it adds to memory, on the CPU.

What it shares with the direct one, dtypes, widths, sources and bad coordinates, is in
test_cuda_on_cpu.py; here is what only it has: windows, passes, runs, and fewer additions.
"""

import pytest
import torch

from sparse_detr.kernels import reference as plain

from .cuda_on_cpu.problems import (
    SHAPES,
    assert_close,
    assert_gradients,
    expected_gradients,
    fused,
    given,
)

# One level larger than a window and one that fits it whole; queries of the coarser one look at a
# level twice as fine.
LARGE = [(61, 70), (31, 35)]


@pytest.mark.parametrize(
    "shapes, tiled_from",
    [(SHAPES, 0), (SHAPES, 1), (LARGE, 1), (LARGE, -1)],
    ids=["all levels", "last levels", "windows", "no windows"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles(cuda, dtype, shapes, tiled_from):
    """Samples in, around and far from the windows of their tiles."""
    queries = sum(h * w for h, w in shapes[max(tiled_from, 0) :])
    if tiled_from < 0:
        queries = 100
    inputs = given(dtype, 16, queries=queries, heads=1, shapes=shapes)
    grad_output = torch.randn(2, queries, 16).to(dtype)
    gradients = expected_gradients(plain.ms_deform_attn, inputs, grad_output)[1]
    found = cuda.ms_deform_attn_backward(grad_output, *inputs, tiled_from=tiled_from, aggregate=True)
    assert_gradients(found, gradients)


@pytest.mark.parametrize("levels, points", [(1, 1), (8, 1), (1, 5), (3, 7), (8, 4), (2, 17)])
def test_any_number_of_samples(cuda, levels, points):
    """One; fewer and more than a pass takes; the most, and more than that (the direct path)."""
    shapes = [(3 + level, 9 - level) for level in range(levels)]
    inputs = fused(torch.float32, 32, True, queries=66, heads=2, points=points, shapes=shapes)
    grad_output = torch.randn(2, 66, 64)
    gradients = expected_gradients(plain.ms_deform_attn_fused, inputs, grad_output)[1]
    found = cuda.ms_deform_attn_fused_backward(grad_output, *inputs, aggregate=True)
    for x, y in zip(found[:3], gradients[:3], strict=True):
        assert_close(x, y, 1e-5)
    if levels * points > 1:  # a single sample has weight 1, whatever its logit
        assert_close(found[3], gradients[3], 1e-5)


def test_all_samples_on_one_pixel(cuda):
    """The longest runs: 256 contributions of a pass to each of four tokens."""
    value, shapes, locations, weights = given(torch.float32, 32, queries=64, heads=1)
    locations[:] = torch.tensor([0.4, 0.6])
    grad_output = torch.randn(2, 64, 32)
    gradients = expected_gradients(plain.ms_deform_attn, (value, shapes, locations, weights), grad_output)[1]
    found = cuda.ms_deform_attn_backward(grad_output, value, shapes, locations, weights, aggregate=True)
    assert_gradients(found, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_sums_are_those_of_the_direct_path(cuda, dtype):
    """In fixed point it does not matter where terms meet: the same bits on both paths."""
    inputs = given(dtype, 32, queries=130, heads=2)
    grad_output = torch.randn(2, 130, 64).to(dtype)
    direct, aggregated = (
        cuda.ms_deform_attn_backward(grad_output, *inputs, deterministic=True, aggregate=aggregate)
        for aggregate in (False, True)
    )
    assert torch.equal(direct[0], aggregated[0])


def test_memory_sees_a_fraction_of_the_contributions(cuda):
    """An encoder as initialised: points 1 to 4 pixels away in the direction of their head, noise 1.

    One reduction per token and group, not per corner: less than a fourth of the direct path's.
    """
    shapes, heads, points = [(40, 56), (20, 28), (10, 14), (5, 7)], 2, 4
    queries = sum(h * w for h, w in shapes)
    reference = torch.cat(
        [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
    ).flip(-1)
    size = torch.tensor([(w, h) for h, w in shapes])[:, None]
    steps = torch.arange(1.0, points + 1)[:, None] * torch.tensor([[[1.0, 0.0]], [[-1.0, 1.0]]])
    offsets = torch.randn(queries, heads, 4, points, 2) + steps[None, :, None]
    locations = (reference[:, None, None, None] + offsets / size)[None]
    value = torch.randn(1, queries, heads, 16)
    weights = torch.rand(locations.shape[:-1])
    grad_output = torch.randn(1, queries, heads * 16)
    counts, grads = [], []
    for aggregate in (False, True):
        before = cuda.vector_reductions()
        grads.append(
            cuda.ms_deform_attn_backward(
                grad_output, value, shapes, locations, weights, tiled_from=0, aggregate=aggregate
            )[0]
        )
        counts.append(cuda.vector_reductions() - before)
    assert_close(grads[1], grads[0].double(), 1e-5)
    assert counts[1] < counts[0] / 4, counts
