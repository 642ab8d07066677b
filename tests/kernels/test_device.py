"""The operators on the device that runs them. On a machine with a GPU this is the proof of the CUDA
kernels; the same tests on the CPU prove the tests.
"""

import pytest
import torch

from sparse_detr.kernels import attention_map_splat, build, ms_deform_attn, reference, status

from .test_ops import OPERATORS, problem

GPU = torch.cuda.is_available()
SIZES = [
    dict(),
    dict(B=1, Q=1, M=1, D=4, L=1, P=1),
    dict(D=16, L=4, P=3),
    dict(D=24, M=2, L=3),
    dict(D=32, M=8, L=4, Q=130),
    dict(D=64, M=1, L=5, P=8),
    dict(D=128, M=2, L=2, P=5),
    dict(D=32, M=1, L=5, P=16),
]


def gpu(*values):
    return pytest.param(*values, marks=pytest.mark.skipif(not GPU, reason="PyTorch sees no GPU"))


def compiled(device):
    found = status(device, load=True)
    if device == "cpu" and (build.mode() == "reference" or "no C++ compiler" in found.reason):
        pytest.skip(found.reason)
    assert found.backend == {"cpu": "cpp-cpu", "cuda": "cuda"}[device], found.reason
    return device


@pytest.fixture(params=["cpu", gpu("cuda")])
def device(request):
    return compiled(request.param)


@pytest.fixture(params=["cpu", gpu("cuda direct"), gpu("cuda aggregated")])
def device_and_path(request, monkeypatch):
    """The device, with both ways in which CUDA sums the gradients of the values."""
    device, _, path = request.param.partition(" ")
    monkeypatch.setenv("SPARSE_DETR_BACKWARD", path or "auto")
    return compiled(device)


def on(device, inputs):
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}


def run(operator, inputs, which):
    """Output and gradients of all floating inputs for a fixed random cotangent."""
    function, before, after = OPERATORS[operator][which], *OPERATORS[operator][2:]
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in (*before, *after)}
    out = function(*(leaves[n] for n in before), inputs["shapes"], *(leaves[n] for n in after))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad((out * cotangent).sum(), list(leaves.values()))
    return out.detach(), dict(zip(leaves, gradients))


def assert_same(found, exact, tolerance):
    for name, x, y in [("output", found[0], exact[0]), *((n, found[1][n], exact[1][n]) for n in exact[1])]:
        x, y = x.double().cpu(), y.double().cpu()
        error = (x - y).norm() / y.norm().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"  # NaN fails, too


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_the_formulas(device_and_path, operator, size, dtype):
    device = device_and_path
    inputs = problem(**size, dtype=dtype)
    wide = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    found = run(operator, on(device, inputs), 0)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    assert found[0].dtype == dtype and found[0].device.type == device
    assert_same(found, run(operator, wide, 1), tolerance[dtype])


@pytest.mark.parametrize("operator", OPERATORS)
def test_queries_of_an_encoder(device_and_path, operator):
    """All tokens in order and enough of them: on CUDA they come in tiles of 8 x 8 pixels."""
    shapes = ((37, 45), (19, 23), (10, 12))
    g = torch.Generator().manual_seed(3)
    tokens, B, M, D, L, P = sum(h * w for h, w in shapes), 2, 8, 16, 3, 4
    inputs = problem(B=B, Q=tokens, M=M, D=D, L=L, P=P, dtype=torch.float32)
    inputs["shapes"] = shapes
    for name in ("value", "key"):
        inputs[name] = torch.randn(B, tokens, M, D, generator=g)
    found = run(operator, on(device_and_path, inputs), 0)
    wide = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    assert_same(found, run(operator, wide, 1), 1e-4)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_coordinates_and_poisoned_memory(device_and_path, operator):
    inputs = problem(B=1, Q=70, M=2, D=16, L=2, dtype=torch.float32)
    for name in ("locations", "point", "box"):
        inputs[name] = torch.full_like(inputs[name], 0.2)  # the upper left corner of both maps
        inputs[name][0, 1, ..., :2] = float("nan")  # of boxes the centre
        inputs[name][0, 2, ..., :2] = float("inf")
        inputs[name][0, 3, ..., :2] = -1e30
    inputs["offsets"] = inputs["offsets"] * 0
    clean = run(operator, on(device_and_path, inputs), 0)
    assert all(x.isfinite().all() for x in (clean[0], *clean[1].values()))
    for name in ("value", "key"):
        inputs[name][0, 34] = float("nan")  # the lower right token of level 0
    poisoned = run(operator, on(device_and_path, inputs), 0)
    assert_same(poisoned, clean, 1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_deterministic_algorithms_give_the_same_bits(device_and_path, operator):
    inputs = on(device_and_path, problem(B=2, Q=300, M=4, D=32, L=4, dtype=torch.float32))
    try:
        torch.use_deterministic_algorithms(True)
        first = run(operator, inputs, 0)
        for _ in range(5):
            again = run(operator, inputs, 0)
            assert torch.equal(first[0], again[0])
            assert all(torch.equal(first[1][n], again[1][n]) for n in first[1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_need_be_neither_contiguous_nor_aligned(device, operator):
    inputs = on(device, problem(dtype=torch.float32, D=16))
    expected = run(operator, inputs, 0)
    strided = {
        n: x.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(x, torch.Tensor) else x
        for n, x in inputs.items()
    }
    assert_same(run(operator, strided, 0), expected, 1e-6)
    shifted = {
        n: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) if isinstance(x, torch.Tensor) else x
        for n, x in inputs.items()
    }
    assert shifted["value"].data_ptr() % 16
    function, before, after = OPERATORS[operator][0], *OPERATORS[operator][2:]
    found = function(*(shifted[n] for n in before), inputs["shapes"], *(shifted[n] for n in after))
    assert_same((found, {}), (expected[0], {}), 1e-6)


@pytest.mark.parametrize("empty", [dict(Q=0), dict(B=0), dict(P=0)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_to_do(device, operator, empty):
    out, gradients = run(operator, on(device, problem(**empty, dtype=torch.float32)), 0)
    assert not out.any() and all(not g.any() for g in gradients.values())


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_wanted_gradients_are_computed(device_and_path, operator):
    """Each alone is what it is among all."""
    inputs = on(device_and_path, problem(Q=70, D=16, dtype=torch.float32))
    exact = run(operator, inputs, 0)[1]
    function, before, after = OPERATORS[operator][0], *OPERATORS[operator][2:]
    for wanted in (*before, *after):
        leaves = {n: inputs[n].clone().requires_grad_(n == wanted) for n in (*before, *after)}
        out = function(*(leaves[n] for n in before), inputs["shapes"], *(leaves[n] for n in after))
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        (found,) = torch.autograd.grad((out * cotangent).sum(), [leaves[wanted]])
        assert_same((found, {}), (exact[wanted], {}), 1e-5)


def test_splat_is_the_reference_to_the_last_bit(device):
    inputs = problem(B=2, Q=60, M=2, L=3, P=2, dtype=torch.float32)
    arguments = [inputs["locations"]], [inputs["weights"]], inputs["shapes"]
    found = attention_map_splat(
        inputs["locations"].to(device), inputs["weights"].to(device), inputs["shapes"]
    )
    assert torch.equal(found.cpu(), reference.attention_map_splat(*arguments))


def test_autocast_keeps_coordinates_in_float32(device):
    inputs = on(device, problem(D=16, dtype=torch.float32))
    arguments = [inputs[n] for n in ("locations", "weights")]
    with torch.autocast(device, torch.bfloat16):
        found = ms_deform_attn(inputs["value"], inputs["shapes"], *arguments)
    assert found.dtype == torch.bfloat16
    exact = ms_deform_attn(inputs["value"], inputs["shapes"], *arguments)
    assert (found.float() - exact).norm() < 2 * torch.finfo(torch.bfloat16).eps * exact.norm()


# Of CUDA alone.

cuda_only = pytest.mark.skipif(not GPU, reason="PyTorch sees no GPU")


@cuda_only
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("path", ["direct", "aggregated"])
def test_cuda_graphs_replay(operator, path, monkeypatch):
    monkeypatch.setenv("SPARSE_DETR_BACKWARD", path)
    inputs = on("cuda", problem(B=1, Q=70, M=2, D=32, dtype=torch.float32))
    expected = run(operator, inputs, 0)
    function, before, after = OPERATORS[operator][0], *OPERATORS[operator][2:]
    leaves = {n: inputs[n].clone().requires_grad_() for n in (*before, *after)}
    cotangent = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1)).cuda()

    def step():
        out = function(*(leaves[n] for n in before), inputs["shapes"], *(leaves[n] for n in after))
        return out, torch.autograd.grad(out, list(leaves.values()), cotangent)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, gradients = step()
    for _ in range(2):
        out.detach().fill_(float("nan"))
        graph.replay()
        assert_same((out.detach(), dict(zip(leaves, gradients))), expected, 1e-5)


@cuda_only
def test_cuda_work_goes_to_the_current_stream():
    inputs = on("cuda", problem(B=1, Q=70, M=2, D=32, dtype=torch.float32))
    arguments = [inputs[n] for n in ("locations", "weights")]
    expected = ms_deform_attn(inputs["value"], inputs["shapes"], *arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on another stream would overtake it
        late = inputs["value"] * 2
        found = ms_deform_attn(late, inputs["shapes"], *arguments)
    stream.synchronize()
    torch.testing.assert_close(found, expected * 2)


@cuda_only
def test_cuda_beyond_2_to_the_31_numbers():
    """Images of a batch whose values have more than 2^31 numbers; the last one is looked at."""
    images, side, heads, channels = 5, 1024, 8, 64  # 2^29 numbers each
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    value = torch.zeros(images, side * side, heads, channels, device="cuda", dtype=torch.bfloat16)
    value[-1, -1] = torch.arange(channels).bfloat16()
    locations = torch.full((images, 1, heads, 1, 1, 2), 1 - 0.5 / side, device="cuda")
    weights = torch.ones(images, 1, heads, 1, 1, device="cuda")
    value.requires_grad_()
    out = ms_deform_attn(value, [(side, side)], locations, weights)
    assert torch.equal(out[-1, 0].detach().view(heads, channels), value[-1, -1].detach())
    (gradient,) = torch.autograd.grad(out.sum(), value)
    assert gradient[-1, -1].min() == 1 and gradient[-1, -2].abs().sum() == 0


@cuda_only
def test_cuda_device_of_the_tensors_counts():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = problem(B=1, Q=70, M=2, D=32, dtype=torch.float32)
    found = run("attention", on("cuda:1", inputs), 0)
    assert found[0].device.index == 1
    assert_same(found, run("attention", on("cuda:0", inputs), 0), 1e-5)


@cuda_only
def test_cuda_refuses_an_unknown_backward_path(monkeypatch):
    monkeypatch.setenv("SPARSE_DETR_BACKWARD", "fastest")
    with pytest.raises(ValueError, match="auto, direct, aggregated"):
        run("attention", on("cuda", problem(dtype=torch.float32)), 0)


@cuda_only
def test_cuda_operators_pass_opcheck():
    inputs = on("cuda", problem(B=1, Q=3, M=2, D=4, dtype=torch.float32))
    flat = [x for pair in inputs["shapes"] for x in pair]
    leaves = [inputs[n].requires_grad_() for n in ("value", "locations", "weights")]
    torch.library.opcheck(torch.ops.sparse_detr.ms_deform_attn.default, (leaves[0], flat, *leaves[1:]))
    assert build.status("cuda").backend == "cuda"
