"""The operators against the plain PyTorch formula: values, gradients, registration, determinism."""

import itertools
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_detr.kernels import (
    attention_map_splat,
    build,
    flops,
    key_aware_deform_attn,
    ms_deform_attn,
    ms_deform_attn_fused,
    reference,
    status,
)

from .forked import Forked

SHAPES = ((7, 5), (4, 3), (2, 2), (1, 3), (3, 1))


@pytest.fixture(scope="module", autouse=True)
def compiled():
    found = status("cpu", load=True)
    if build.mode() == "reference" or "no C++ compiler" in found.reason:
        pytest.skip(found.reason)
    assert found.backend == "cpp-cpu", found.reason


def problem(B=2, Q=9, M=3, D=8, L=2, P=4, dtype=torch.float64, low=-0.3, high=1.3, seed=0):
    """Random inputs of all operators; some samples lie outside the maps."""
    g = torch.Generator().manual_seed(seed)
    shapes = SHAPES[:L]
    N = sum(h * w for h, w in shapes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rand(*size):
        return torch.rand(*size, generator=g, dtype=torch.float64)

    box = torch.cat([rand(B, Q, L, 2), rand(B, Q, L, 2) * 0.6 + 0.05], -1)
    return {
        "shapes": shapes,
        "value": (rand(B, N, M, D) * 2 - 1).to(dtype),
        "key": (rand(B, N, M, D) * 2 - 1).to(dtype),
        "query": (rand(B, Q, M, D) * 2 - 1).to(dtype),
        "locations": (rand(B, Q, M, L, P, 2) * (high - low) + low).to(wide),
        "weights": rand(B, Q, M, L, P).to(dtype),
        "point": rand(B, Q, L, 2).to(wide),
        "box": box.to(wide),
        "offsets": ((rand(B, Q, M, L, P, 2) - 0.5) * 6).to(dtype),
        "logits": ((rand(B, Q, M, L * P) - 0.5) * 8).to(dtype),
    }


def plain_key_aware(*args):
    return reference.key_aware_deform_attn(*args)[0]


# operator: (compiled, plain PyTorch, names of the tensors before and after `shapes`)
OPERATORS = {
    "attention": (ms_deform_attn, reference.ms_deform_attn, ["value"], ["locations", "weights"]),
    "fused, points": (
        ms_deform_attn_fused,
        reference.ms_deform_attn_fused,
        ["value"],
        ["point", "offsets", "logits"],
    ),
    "fused, boxes": (
        ms_deform_attn_fused,
        reference.ms_deform_attn_fused,
        ["value"],
        ["box", "offsets", "logits"],
    ),
    "key-aware": (key_aware_deform_attn, plain_key_aware, ["query", "key", "value"], ["locations"]),
    "key-aware, keys are values": (
        lambda query, *rest: key_aware_deform_attn(query, None, *rest),
        lambda query, *rest: plain_key_aware(query, None, *rest),
        ["query", "value"],
        ["locations"],
    ),
}


def run(operator, inputs, which):
    """Output and gradients of all floating inputs for a fixed random cotangent."""
    function, before, after = OPERATORS[operator][which], *OPERATORS[operator][2:]
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in (*before, *after)}
    out = function(*(leaves[n] for n in before), inputs["shapes"], *(leaves[n] for n in after))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradients = torch.autograd.grad((out * cotangent).sum(), list(leaves.values()))
    return out.detach(), dict(zip(leaves, gradients))


SIZES = [
    dict(),
    dict(B=1, Q=1, M=1, D=4, L=1, P=1),
    dict(D=16, L=4, P=3),
    dict(D=24, M=2, L=3),
    dict(D=32, M=8, L=4),
    dict(D=64, M=1, L=5, P=8),
    dict(D=128, M=2, L=2, P=5),
    dict(B=3, D=7, M=5),
    dict(Q=70, D=32),
    dict(D=3, L=5, P=1),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients_are_the_formulas(operator, size, dtype):
    exact = run(operator, problem(**size), 1)
    out, gradients = run(operator, problem(**size, dtype=dtype), 0)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(out.double(), exact[0], rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        assert gradient.dtype == problem(**size, dtype=dtype)[name].dtype
        scale = max(1.0, exact[1][name].abs().max().item())
        torch.testing.assert_close(
            gradient.double() / scale,
            exact[1][name] / scale,
            rtol=tolerance,
            atol=tolerance,
            msg=f"gradient of {name}",
        )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [32, 58])  # 58: blocks of 32, 16 and 8 channels, and two alone
def test_half_types_lose_only_what_rounding_their_inputs_loses(operator, dtype, D):
    """Sums run in float32: the error is that of a float32 computation, rounded once."""
    half = problem(dtype=dtype, D=D, L=4)
    wide = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in half.items()}
    exact, gradients = run(operator, wide, 1)
    out, found = run(operator, half, 0)
    unit = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= 2 * unit * exact.norm()
    # The cotangent is rounded too: its error and the result's.
    for name, gradient in found.items():
        assert (gradient.double() - gradients[name]).norm() <= 4 * unit * gradients[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_to_nearest_even(dtype):
    """Two samples at the centres of two cells, whose sum float32 holds exactly."""
    heads, channels = 64, 58
    value = torch.randn(1, 2, heads, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    value[0, 0, :, 0], value[0, 0, :, 1], value[0, 0, :, 2] = float("inf"), float("-inf"), float("nan")
    centres = torch.tensor([[0.25, 0.5], [0.75, 0.5]]).expand(1, 1, heads, 1, 2, 2).contiguous()
    weights = torch.tensor([1.0, 0.5], dtype=dtype).expand(1, 1, heads, 1, 2).contiguous()
    out = ms_deform_attn(value, [(1, 2)], centres, weights)
    expected = (value[:, :1].float() + value[:, 1:].float() / 2).to(dtype).flatten(2)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_pass_gradcheck(operator):
    function, _, before, after = OPERATORS[operator]
    inputs = problem(B=1, Q=3, M=2, D=3, L=2, P=2, seed=4)
    names = [*before, *after]

    def call(*tensors):
        return function(*tensors[: len(before)], inputs["shapes"], *tensors[len(before) :])

    leaves = [inputs[n].clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-5)


def test_key_aware_attention_far_outside_averages_zeros():
    inputs = problem(B=1, Q=2, M=2, D=4)
    inputs["locations"] = inputs["locations"] + 7.0
    out, gradients = run("key-aware, keys are values", inputs, 0)
    assert not out.any() and all(not g.any() for g in gradients.values())


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_registered_as_pytorch_wants_them(operator):
    inputs = problem(B=1, Q=3, M=2, D=4, dtype=torch.float32)
    flat = [x for pair in inputs["shapes"] for x in pair]
    ops = torch.ops.sparse_detr
    op = {"a": ops.ms_deform_attn, "f": ops.ms_deform_attn_fused, "k": ops.key_aware_deform_attn}[operator[0]]
    before, after = ([inputs[n].requires_grad_() for n in names] for names in OPERATORS[operator][2:])
    if operator == "key-aware, keys are values":
        before.insert(1, None)
    torch.library.opcheck(op.default, (*before, flat, *after))


def test_backward_operators_are_registered_as_pytorch_wants_them():
    inputs = problem(B=1, Q=3, M=2, D=4, dtype=torch.float32)
    flat = [x for pair in inputs["shapes"] for x in pair]
    value, key, query, locations = (inputs[n] for n in ("value", "key", "query", "locations"))
    ops, grad = torch.ops.sparse_detr, torch.randn(1, 3, 8)
    rest = value, flat, locations, inputs["weights"]
    torch.library.opcheck(ops.ms_deform_attn_backward.default, (grad, *rest, [True, False, True]))
    rest = value, flat, inputs["box"], inputs["offsets"], inputs["logits"]
    torch.library.opcheck(ops.ms_deform_attn_fused_backward.default, (grad, *rest, [True, True, False, True]))
    for k in (key, None):
        output, lse = ops.key_aware_deform_attn(query, k, value, flat, locations)
        torch.library.opcheck(
            ops.key_aware_deform_attn_backward.default,
            (grad, output, lse, query, k, value, flat, locations, [True] * 4),
        )


def test_splat_is_registered_as_pytorch_wants_it():
    inputs = problem(B=1, Q=3, M=2, dtype=torch.float32)
    flat = [x for pair in inputs["shapes"] for x in pair]
    torch.library.opcheck(
        torch.ops.sparse_detr.attention_map_splat.default, ([inputs["locations"]], [inputs["weights"]], flat)
    )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("threads", [2, 5])
def test_results_are_the_same_bits_for_any_number_of_threads(operator, threads):
    inputs = problem(B=2, Q=200, M=4, D=16, L=4, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(operator, inputs, 0)
        torch.set_num_threads(threads)
        many = run(operator, inputs, 0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], many[0])
    for name in one[1]:
        assert torch.equal(one[1][name], many[1][name]), name


@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_need_not_be_contiguous(operator):
    inputs = problem(dtype=torch.float32)
    strided = {
        n: x.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(x, torch.Tensor) else x
        for n, x in inputs.items()
    }
    assert not strided["value"].is_contiguous()
    out, gradients = run(operator, strided, 0)
    expected = run(operator, inputs, 0)
    assert torch.equal(out, expected[0])
    assert all(torch.equal(gradients[n], expected[1][n]) for n in gradients)


@pytest.mark.parametrize("operator", ["attention", "key-aware"])
def test_points_on_borders_and_pixel_centres(operator):
    """At whole pixel coordinates the slope jumps: the one to the right counts, as in grid_sample."""
    inputs = problem(B=1, Q=169, M=1, D=4, L=2, P=1)
    inputs["shapes"] = ((8, 4), (2, 16))  # powers of two: no coordinate is rounded
    g = torch.Generator().manual_seed(2)
    for name in ("value", "key"):
        inputs[name] = torch.rand(1, 64, 1, 4, generator=g, dtype=torch.float64)
    # Pixel centres, borders, the middle between pixels, partly outside; -1 and -2 are pixel -1 of a map.
    steps = torch.tensor([-3, -2, -1, 0, 1, 2, 3, 5, 8, 12, 15, 16, 19], dtype=torch.float64) / 16
    inputs["locations"] = torch.cartesian_prod(steps, steps).view(1, 169, 1, 1, 1, 2).repeat(1, 1, 1, 2, 1, 1)
    exact, found = run(operator, inputs, 1), run(operator, inputs, 0)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-12, atol=1e-12)
    for name in found[1]:
        torch.testing.assert_close(found[1][name], exact[1][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
def test_queries_may_come_in_any_order(operator):
    inputs = problem(B=2, Q=50, dtype=torch.float32)
    order = torch.randperm(50)
    mixed = {
        n: x[:, order] if isinstance(x, torch.Tensor) and x.shape[1] == 50 else x for n, x in inputs.items()
    }
    expected, found = run(operator, inputs, 0)[0], run(operator, mixed, 0)[0]
    assert torch.equal(found, expected[:, order])


@pytest.mark.parametrize("operator", ["attention", "key-aware"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_bad_coordinate_is_outside_and_stays_alone(operator, bad):
    inputs = problem(B=1, Q=4, M=1, D=8, dtype=torch.float32)
    wrong = dict(inputs, locations=inputs["locations"].clone())
    wrong["locations"][0, 2, 0, 1, 3, 0] = bad
    wrong["locations"][0, 2, 0, 0, 0, 1] = bad
    out, gradients = run(operator, wrong, 0)
    expected = run(operator, inputs, 0)[0]
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients.values())
    others = [0, 1, 3]
    assert torch.equal(out[0, others], expected[0, others])
    outside = dict(inputs, locations=inputs["locations"].clone())
    outside["locations"][0, 2, 0, 1, 3] = 5.0
    outside["locations"][0, 2, 0, 0, 0] = 5.0
    torch.testing.assert_close(out, run(operator, outside, 0)[0])


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_sampled_does_not_matter(operator):
    """NaN in a token that no sample touches reaches nothing."""
    inputs = problem(B=1, Q=3, M=1, D=8, L=2, dtype=torch.float32)
    inputs["offsets"] = inputs["offsets"] * 0
    for name in ("locations", "point"):
        inputs[name] = torch.full_like(inputs[name], 0.2)  # the upper left corner of both maps
    inputs["box"] = torch.full_like(inputs["box"], 0.2)
    clean = run(operator, inputs, 0)
    last = SHAPES[0][0] * SHAPES[0][1] - 1  # the lower right token of level 0
    for name in ("value", "key"):
        inputs[name] = inputs[name].clone()
        inputs[name][0, last] = float("nan")
    poisoned = run(operator, inputs, 0)
    assert torch.equal(clean[0], poisoned[0])
    for name in clean[1]:
        assert torch.equal(clean[1][name], poisoned[1][name]), name


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("which", [0, 1], ids=["compiled", "plain"])
@pytest.mark.parametrize("empty", [dict(Q=0), dict(B=0), dict(P=0)], ids=str)
def test_nothing_to_sample_is_fine(operator, empty, which):
    out, gradients = run(operator, problem(**empty, dtype=torch.float32), which)
    assert not out.any()
    assert all(not g.any() for g in gradients.values())


def test_splat_is_the_slow_loop_and_does_not_depend_on_order():
    inputs = problem(B=2, Q=6, M=2, L=3, P=2, dtype=torch.float32)
    locations, weights, shapes = inputs["locations"], inputs["weights"], inputs["shapes"]
    result = attention_map_splat(locations, weights, shapes)
    expected, start = torch.zeros_like(result, dtype=torch.float64), 0
    for level, (h, w) in enumerate(shapes):
        for b, q, m, p in itertools.product(range(2), range(6), range(2), range(2)):
            x, y = (locations[b, q, m, level, p].double() * torch.tensor([w, h])).tolist()
            column, row = int(x // 1), int(y // 1)
            for r, c in itertools.product((row, row + 1), (column, column + 1)):
                if 0 <= r < h and 0 <= c < w:
                    share = (1 - abs(x - c)) * (1 - abs(y - r)) * weights[b, q, m, level, p]
                    expected[b, start + r * w + c] += share
        start += h * w
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)
    order = torch.randperm(6)
    assert torch.equal(attention_map_splat(locations[:, order], weights[:, order], shapes), result)
    parts = [attention_map_splat(list(locations.split(2, 1)), list(weights.split(2, 1)), shapes)]
    assert torch.equal(parts[0], result)
    assert torch.equal(reference.attention_map_splat([locations], [weights], shapes), result)


def test_autocast_keeps_coordinates_in_float32():
    inputs = problem(D=16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ms_deform_attn_fused(
            inputs["value"], inputs["shapes"], inputs["point"], inputs["offsets"], inputs["logits"]
        )
        torch.testing.assert_close(
            out,
            ms_deform_attn_fused(
                inputs["value"].bfloat16(),
                inputs["shapes"],
                inputs["point"],
                inputs["offsets"],
                inputs["logits"],
            ),
        )
    assert out.dtype == torch.bfloat16
    exact = ms_deform_attn_fused(
        inputs["value"], inputs["shapes"], inputs["point"], inputs["offsets"], inputs["logits"]
    )
    # Only the values were rounded: with bfloat16 coordinates the error would be many times this.
    assert (out.float() - exact).norm() < 2 * torch.finfo(torch.bfloat16).eps * exact.norm()


def test_flops_are_the_published_count():
    """4 multiply-adds per sample and channel: 4 * C * L * P per query; torch counts them twice."""
    inputs = problem(B=1, Q=10, M=8, D=32, L=4, P=4, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        ms_deform_attn_fused(
            inputs["value"], inputs["shapes"], inputs["point"], inputs["offsets"], inputs["logits"]
        )
    assert counter.get_total_flops() == 2 * 10 * 16384


@pytest.mark.parametrize(
    "operator, macs",
    [("attention", 4), ("fused, boxes", 4), ("key-aware", 10), ("key-aware, keys are values", 10)],
)
def test_fvcore_counts_the_operators_with_our_handles(operator, macs):
    """Key-aware attention counts as published: 4 for keys, 4 for values, 1 per score, 1 per sum."""
    nn = pytest.importorskip("fvcore.nn")
    function, _, before, after = OPERATORS[operator]
    inputs = problem(B=1, Q=10, M=8, D=32, L=4, P=4, dtype=torch.float32)
    model = torch.nn.Module.__new__(_Module).of(
        lambda *x: function(*x[: len(before)], inputs["shapes"], *x[len(before) :])
    )
    counts = nn.FlopCountAnalysis(model, tuple(inputs[n] for n in (*before, *after)))
    counts.unsupported_ops_warnings(False).set_op_handle(**flops.fvcore_handles())
    assert counts.total() == 10 * macs * 4096


def test_the_folder_can_be_imported_under_two_names(tmp_path):
    code = (
        "import sys, importlib.util as u, sparse_detr.kernels as k; "
        "spec = u.spec_from_file_location('other', k.__file__); "
        "sys.modules['other'] = u.module_from_spec(spec); "
        "spec.loader.exec_module(sys.modules['other']); print(sys.modules['other'].status)"
    )
    status, _, err = Forked(code, [], dict(os.environ), tmp_path).finish()
    assert status == 0, err


def test_compiled_graphs_hold_the_operator():
    inputs = problem(dtype=torch.float32)

    def model(value, locations, weights):
        return ms_deform_attn(value, inputs["shapes"], locations, weights) * 2

    arguments = [inputs[n] for n in ("value", "locations", "weights")]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), model(*arguments))
    exported = torch.export.export(torch.nn.Module.__new__(_Module).of(model), tuple(arguments))
    assert any("sparse_detr.ms_deform_attn" in str(node.target) for node in exported.graph.nodes)


class _Module(torch.nn.Module):
    def of(self, function):
        super().__init__()
        self.function = function
        return self

    def forward(self, *args):
        return self.function(*args)


def test_second_derivatives_are_refused():
    inputs = problem(B=1, Q=2, M=1, D=2)
    value = inputs["value"].requires_grad_()
    out = ms_deform_attn(value, inputs["shapes"], inputs["locations"].requires_grad_(), inputs["weights"])
    (gradient,) = torch.autograd.grad(out.sum(), inputs["locations"], create_graph=True)
    with pytest.raises(NotImplementedError, match="SPARSE_DETR_OPS=reference"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(shapes=((7, 5), (4, 4))), "value"),
        (dict(locations=torch.zeros(2, 9, 3, 3, 4, 2)), "locations"),
        (dict(weights=torch.zeros(2, 9, 3, 2, 5)), "weights"),
        (dict(locations=torch.zeros(2, 9, 3, 2, 4, 2, dtype=torch.bfloat16)), "locations"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    inputs = {**problem(dtype=torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*(inputs[n] for n in ("value", "shapes", "locations", "weights")))


def test_the_library_is_the_one_in_the_cache():
    found = build.status("cpu")
    assert found.cache_dir and found.backend == "cpp-cpu"
