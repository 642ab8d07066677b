"""The arithmetic of the CUDA kernels, without a GPU: the .cu files run on the CPU (cuda_on_cpu/).

What this proves: indices, bilinear weights, softmax, gradients, sums over lanes, tiles, barriers
within a warp, memory bounds. What only a GPU can prove: the device compiler's output and speed.
"""

import ctypes
import mmap

import pytest
import torch

from sparse_detr.kernels import reference as plain

from .cuda_on_cpu import CudaOnCpu, _GradientMap, _SampleGradients, _Samples, _Sizes
from .cuda_on_cpu.problems import (
    SHAPES,
    TOLERANCE,
    accumulator,
    assert_close,
    assert_gradients,
    expected_gradients,
    fused,
    given,
    side_tolerance,
)

# Every kernel: vector widths 16, 32, 64 and the one for any number of channels, which 40 makes take
# two steps and 5 leaves lanes idle. Of these the aggregated backward has the first three and leaves
# the rest to the direct one; 75 queries are a full block of it and a part of one.
WIDTHS = [
    (torch.float32, 16),
    (torch.float32, 32),
    (torch.float32, 64),
    (torch.float32, 40),
    (torch.bfloat16, 16),
    (torch.bfloat16, 32),
    (torch.bfloat16, 64),
    (torch.bfloat16, 40),
    (torch.float16, 32),
    (torch.float16, 5),
    (torch.float64, 40),
    (torch.float64, 5),
]


@pytest.mark.parametrize("dtype, channels", WIDTHS, ids=str)
def test_given_samples(cuda, dtype, channels):
    inputs = given(dtype, channels, queries=75)
    grad_output = torch.randn(2, 75, 3 * channels).to(dtype)
    output, gradients = expected_gradients(plain.ms_deform_attn, inputs, grad_output)
    for descending in (False, True):
        found = cuda.ms_deform_attn(*inputs, descending=descending)
        assert_close(found, output, TOLERANCE[dtype])
        for aggregate in (False, True):
            found = cuda.ms_deform_attn_backward(
                grad_output, *inputs, descending=descending, aggregate=aggregate
            )
            assert_gradients(found, gradients)


@pytest.mark.parametrize("aggregate", [False, True], ids=["direct", "aggregated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scalar_reductions_of_earlier_devices(libraries, dtype, aggregate):
    inputs = given(dtype, 32, queries=70)
    grad_output = torch.randn(2, 70, 96).to(dtype)
    expected = expected_gradients(plain.ms_deform_attn, inputs, grad_output)[1]
    older = CudaOnCpu(libraries[1])
    found = older.ms_deform_attn_backward(grad_output, *inputs, aggregate=aggregate)
    assert_gradients(found, expected)


@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
@pytest.mark.parametrize("dtype, channels", WIDTHS, ids=str)
def test_fused_samples(cuda, dtype, channels, boxes):
    for offset_dtype in {accumulator(dtype), dtype}:
        inputs = fused(dtype, channels, boxes, queries=75, offset_dtype=offset_dtype)
        grad_output = torch.randn(2, 75, 3 * channels).to(dtype)
        output, gradients = expected_gradients(plain.ms_deform_attn_fused, inputs, grad_output)
        assert_close(cuda.ms_deform_attn_fused(*inputs), output, TOLERANCE[dtype])
        for aggregate in (False, True):
            found = cuda.ms_deform_attn_fused_backward(grad_output, *inputs, aggregate=aggregate)
            assert_gradients(found, gradients)


@pytest.mark.parametrize("separate", [False, True], ids=["keys=values", "keys"])
@pytest.mark.parametrize("dtype, channels", WIDTHS, ids=str)
def test_key_aware(cuda, dtype, channels, separate):
    value, shapes, locations, _ = given(dtype, channels)
    query = torch.randn(2, 37, 3, channels).to(dtype)
    key = torch.randn_like(value) if separate else None
    grad_output = torch.randn(2, 37, 3 * channels).to(dtype)
    inputs = (query, key, value, shapes, locations)
    expected, gradients = expected_gradients(plain.key_aware_deform_attn, inputs, grad_output)
    expected_lse = plain.key_aware_deform_attn(
        *(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)
    )[1]
    for descending in (False, True):
        output, lse = cuda.key_aware_deform_attn(*inputs, descending=descending)
        assert_close(output, expected, TOLERANCE[dtype])
        assert_close(lse, expected_lse, side_tolerance(lse.dtype))
        found = cuda.key_aware_deform_attn_backward(grad_output, output, lse, *inputs, descending=descending)
        # <grad_output, output> uses the rounded output, as in flash attention.
        for x, y in zip([x for x in found if x is not None], gradients, strict=True):
            assert_close(x, y, max(TOLERANCE[dtype] * 4, side_tolerance(accumulator(dtype))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first_level", [0, 1, 2])
def test_tiles_cover_every_query_once(cuda, dtype, first_level):
    """Encoder queries, all tokens or those of the last levels: the same bits as from a list."""
    queries = sum(h * w for h, w in SHAPES[first_level:])
    inputs = given(dtype, 32, queries=queries, heads=1)
    grad_output = torch.randn(2, queries, 32).to(dtype)
    tiled = cuda.ms_deform_attn(*inputs, tiled_from=first_level)
    assert torch.equal(tiled, cuda.ms_deform_attn(*inputs))
    of_tiles = cuda.ms_deform_attn_backward(grad_output, *inputs, tiled_from=first_level)
    of_list = cuda.ms_deform_attn_backward(grad_output, *inputs)
    assert torch.equal(of_tiles[1], of_list[1]) and torch.equal(of_tiles[2], of_list[2])
    assert_close(of_tiles[0], of_list[0].double(), TOLERANCE[dtype] + 1e-7)
    query = torch.randn(2, queries, 1, 32).to(dtype)
    keyed = (query, None, *inputs[:3])
    output, lse = cuda.key_aware_deform_attn(*keyed)
    assert torch.equal(cuda.key_aware_deform_attn(*keyed, tiled_from=first_level)[0], output)
    of_tiles, of_list = (
        cuda.key_aware_deform_attn_backward(grad_output, output, lse, *keyed, tiled_from=t)
        for t in (first_level, -1)
    )
    assert torch.equal(of_tiles[0], of_list[0]) and torch.equal(of_tiles[3], of_list[3])


@pytest.mark.parametrize("levels, points", [(1, 1), (8, 1), (1, 5), (8, 9), (8, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_samples(cuda, dtype, levels, points):
    """One; a number that fills no chunk evenly; many chunks; more than shared memory holds."""
    shapes = [(3 + level, 9 - level) for level in range(levels)]
    inputs = fused(dtype, 32, False, queries=6, heads=2, points=points, shapes=shapes)
    grad_output = torch.randn(2, 6, 64).to(dtype)
    output, gradients = expected_gradients(plain.ms_deform_attn_fused, inputs, grad_output)
    assert_close(cuda.ms_deform_attn_fused(*inputs), output, TOLERANCE[dtype])
    found = cuda.ms_deform_attn_fused_backward(grad_output, *inputs)
    assert_close(found[0], gradients[0], TOLERANCE[dtype])
    if levels * points > 1:  # a single sample has weight 1, whatever its logit
        assert_close(found[3], gradients[3], 1e-5)
    value, shapes, locations, _ = given(dtype, 32, 6, 2, points, shapes)
    keyed = (torch.randn(2, 6, 2, 32).to(dtype), None, value, shapes, locations)
    output, gradients = expected_gradients(plain.key_aware_deform_attn, keyed, grad_output)
    found, lse = cuda.key_aware_deform_attn(*keyed)
    assert_close(found, output, TOLERANCE[dtype])
    found = cuda.key_aware_deform_attn_backward(grad_output, found, lse, *keyed)
    assert_close(found[2], gradients[1], TOLERANCE[dtype] * 4)


def test_level_of_every_sample(cuda):
    for points in [*range(1, 257), 1024, 2048, 4096]:
        for sample in {0, 1, points - 1, points, 3 * points - 1, 3 * points, 8 * points - 1}:
            assert cuda.library.level_of(points, sample) == sample // points


@pytest.mark.parametrize("channels", [32, 7])
def test_outside_and_nonfinite(cuda, channels):
    """Samples that leave the map, NaN and infinite coordinates, and NaN in tokens nobody samples."""
    value, shapes, locations, weights = given(torch.float32, channels, queries=70)
    locations[:, 0] = float("nan")
    locations[:, 1, ..., 0] = float("inf")
    locations[:, 2, ..., 1] = -1e30
    locations[:, 3:] = 0.5 / torch.tensor([9.0, 7.0])  # the first pixel of level 1: a single token
    locations[:, 3:, :, [0, 2]] = 5.0
    poisoned = torch.full_like(value, float("nan"))
    first = shapes[0][0] * shapes[0][1]
    poisoned[:, first] = value[:, first]
    corners = [first + 1, first + 9, first + 10]  # of the same cell
    poisoned[:, corners] = value[:, corners]
    others = [n for n in range(value.shape[1]) if n not in (first, *corners)]
    for x in (value, poisoned):
        output = cuda.ms_deform_attn(x, shapes, locations, weights)
        assert torch.equal(output[:, :3], torch.zeros(2, 3, 3 * channels))
        torch.testing.assert_close(
            output, plain.ms_deform_attn(value, shapes, locations, weights), rtol=1e-5, atol=1e-5
        )
        grad_output = torch.randn_like(output)
        for aggregate in (False, True):
            grads = cuda.ms_deform_attn_backward(
                grad_output, x, shapes, locations, weights, aggregate=aggregate
            )
            assert not any(g.isnan().any() for g in grads)
            assert all(g[:, :3].abs().sum() == 0 for g in grads[1:])
            assert grads[0][:, others].abs().sum() == 0 and grads[0][:, first].abs().sum() > 0
        query = torch.randn(2, 70, 3, channels)
        output, lse = cuda.key_aware_deform_attn(query, None, x, shapes, locations)
        torch.testing.assert_close(lse[:, :3], torch.full((2, 3, 3), 12.0).log())  # scores are 0
        grads = cuda.key_aware_deform_attn_backward(
            grad_output, output, lse, query, None, x, shapes, locations
        )
        assert not any(g.isnan().any() for g in grads if g is not None)
        assert grads[3][:, :3].abs().sum() == 0


def test_border_agrees_with_grid_sample(cuda):
    """On whole pixels, on the last row and column, and exactly one pixel outside."""
    shapes = [(4, 8)]  # powers of two: locations are exact
    x, y = torch.meshgrid(torch.arange(-3, 21) / 2, torch.arange(-3, 13) / 2, indexing="ij")
    pixels = torch.stack([x, y], dim=-1).double().reshape(1, -1, 1, 1, 1, 2)
    locations = (pixels + 0.5) / torch.tensor([8.0, 4.0])
    value = torch.randn(1, 32, 1, 6, dtype=torch.float64)
    inputs = (value, shapes, locations, torch.ones(locations.shape[:-1], dtype=torch.float64))
    grad_output = torch.randn(1, pixels.shape[1], 6, dtype=torch.float64)
    output, gradients = expected_gradients(plain.ms_deform_attn, inputs, grad_output)
    torch.testing.assert_close(cuda.ms_deform_attn(*inputs), output)
    for found, expected in zip(cuda.ms_deform_attn_backward(grad_output, *inputs), gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_deterministic_sums_ignore_the_order(cuda, dtype):
    """Queries in another order are the same sums in another order: equal bits in fixed point."""
    value, shapes, locations, weights = given(dtype, 32, queries=64, heads=2)
    grad_output = torch.randn(2, 64, 64).to(dtype)
    order = torch.randperm(64)

    def grad_value(order, deterministic):
        return cuda.ms_deform_attn_backward(
            grad_output[:, order],
            value,
            shapes,
            locations[:, order],
            weights[:, order],
            deterministic=deterministic,
        )[0]

    straight = torch.arange(64)
    assert torch.equal(grad_value(straight, True), grad_value(order, True))
    if dtype != torch.bfloat16:  # whose rounding hides the difference
        assert not torch.equal(grad_value(straight, False), grad_value(order, False))
    expected = expected_gradients(plain.ms_deform_attn, (value, shapes, locations, weights), grad_output)[1][
        0
    ]
    assert_close(grad_value(order, True), expected, max(TOLERANCE[dtype], 1e-11))

    query = torch.randn(2, 64, 2, 32).to(dtype)
    key = torch.randn_like(value)
    largest = max(x.abs().max() for x in (query, key, value, grad_output)).to(locations.dtype)
    bound = largest * (1 + 2 * 32**0.5 * largest**2)

    def key_aware(order):
        keyed = (query[:, order], key, value, shapes, locations[:, order])
        output, lse = cuda.key_aware_deform_attn(*keyed)
        return cuda.key_aware_deform_attn_backward(grad_output[:, order], output, lse, *keyed, bound=bound)

    first, second = key_aware(straight), key_aware(order)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])


def test_deterministic_fused_and_special_bounds(cuda):
    inputs = fused(torch.float32, 32, True)
    grad_output = torch.randn(2, 37, 96)
    expected = expected_gradients(plain.ms_deform_attn_fused, inputs, grad_output)[1]
    found = cuda.ms_deform_attn_fused_backward(grad_output, *inputs, deterministic=True)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, 1e-5)
    for scale, check in (
        (0.0, lambda g: g.abs().max() == 0),
        (1e-44, lambda g: g.isfinite().all()),
        (1e36, lambda g: g.isfinite().all()),
        (float("inf"), lambda g: g.isnan().all()),
        (float("nan"), lambda g: g.isnan().all()),
    ):
        grads = cuda.ms_deform_attn_fused_backward(grad_output * scale, *inputs, deterministic=True)
        assert check(grads[0]), f"grad_output * {scale}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_splat_is_the_reference_to_the_last_bit(cuda, dtype):
    layers = [given(dtype, 1, queries=50) for _ in range(3)]
    locations = [x[2].clone() for x in layers]
    locations[0][:, 0] = float("nan")
    locations[1][:, 1] = torch.tensor([1.0, -0.01])
    weights = [x[3] for x in layers]
    expected = plain.attention_map_splat(locations, weights, SHAPES)
    assert torch.equal(cuda.attention_map_splat(locations, weights, SHAPES), expected)


def test_beyond_2_to_the_31_numbers(cuda):
    """The third image of a batch starts at number 2^31; only the sampled pages exist in memory."""
    private, anonymous, no_reserve = 0x02, 0x20, 0x4000  # Linux
    images, side, channels = 3, 4096, 64
    numbers = images * side * side * channels  # 2^30 per image
    read_write = mmap.PROT_READ | mmap.PROT_WRITE
    maps = [
        torch.frombuffer(
            mmap.mmap(-1, 4 * numbers, flags=private | anonymous | no_reserve, prot=read_write),
            dtype=torch.float32,
        ).view(images, side * side, 1, channels)
        for _ in range(2)
    ]
    value, grad_value = maps
    value[2, -1] = torch.arange(64.0)
    shapes = (ctypes.c_int64 * 2)(side, side)
    sizes = _Sizes(images, 1, 1, channels, 1, 1, shapes, -1, 0)
    locations = torch.full((images, 1, 1, 1, 1, 2), 1 - 0.5 / side)
    weights = torch.ones(images, 1, 1, 1, 1)
    samples = _Samples(locations=locations.data_ptr(), weights=weights.data_ptr())
    output = torch.empty(images, 1, channels)

    def pointer(x):
        return ctypes.c_void_p(x.data_ptr())

    library = cuda.library
    call = (ctypes.byref(sizes), 0)
    assert library.run_forward(*call, pointer(value), ctypes.byref(samples), pointer(output)) == 0
    assert torch.equal(output[2, 0], torch.arange(64.0)) and output[:2].abs().sum() == 0
    sums, no_side = _GradientMap(sum=grad_value.data_ptr()), _SampleGradients()
    assert (
        library.run_backward(
            *call,
            pointer(output),
            pointer(value),
            ctypes.byref(samples),
            ctypes.byref(sums),
            ctypes.byref(no_side),
            None,
        )
        == 0
    )
    assert torch.equal(grad_value[2, -1, 0], torch.arange(64.0))
    assert grad_value[2, -2].abs().sum() == 0
