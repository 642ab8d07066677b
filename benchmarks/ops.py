"""Deformable attention against everything importable that computes the same.

Sampling locations are those of a network at the start of its training, plus noise: each head looks
along its direction, 1 to P cells from the reference point. Uniform random locations would have no
locality, and locations that are all the same too much of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_detr import kernels

from .timing import Timing, peak_memory, take_turns

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # an 800x1333 image at strides 8 to 64
HEADS, CHANNELS, POINTS = 8, 32, 4
KINDS = ("dense", "high levels", "30 %", "10 %", "decoder 900", "decoder 300")
OURS = "this package"
FULL = "this package, float32"  # beside 16 bits
PLAIN = "grid_sample"


@dataclass(frozen=True)
class Problem:
    """Inputs of one layer for one image; Q queries, N = sum of H * W tokens.

    levels: (H, W) of each; value, key (1, N, M, D); query (1, Q, M, D); reference (1, Q, L, 2);
    offsets (1, Q, M, L, P, 2) in cells; logits (1, Q, M, L * P); locations (1, Q, M, L, P, 2).
    """

    levels: tuple[tuple[int, int], ...]
    value: Tensor
    key: Tensor
    query: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    locations: Tensor
    weights: Tensor

    def leaves(self, *names: str) -> Problem:
        return replace(self, **{n: getattr(self, n).detach().requires_grad_() for n in names})


def scaled_levels(scale: float) -> tuple[tuple[int, int], ...]:
    """``LEVELS`` with sides of that share, for trials."""
    return tuple((max(1, round(h * scale)), max(1, round(w * scale))) for h, w in LEVELS)


def token_centres(levels: tuple[tuple[int, int], ...]) -> Tensor:
    """(N, 2), normalised."""
    centres = []
    for h, w in levels:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        centres.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(centres)


def problem(
    kind: str, levels: tuple[tuple[int, int], ...], device: str, dtype: torch.dtype, seed: int
) -> Problem:
    """``kind``: which queries: all tokens ("dense"), those of all maps but the finest ("high levels",
    as in Lite DETR), "30 %" or "10 %" of all, or points anywhere ("decoder 900", "decoder 300")."""
    g = torch.Generator().manual_seed(seed)
    centres, (L, M, D, P) = token_centres(levels), (len(levels), HEADS, CHANNELS, POINTS)
    N = len(centres)
    if kind.startswith("decoder"):
        points = torch.rand(int(kind.split()[1]), 2, generator=g)
    elif kind == "dense":
        points = centres
    elif kind == "high levels":
        points = centres[levels[0][0] * levels[0][1] :]
    else:
        kept = torch.randperm(N, generator=g)[: math.ceil(N * float(kind.split()[0]) / 100)]
        cell = (centres[kept] * 16).long()
        order = (cell[:, 1] * 16 + cell[:, 0]).argsort(stable=True)  # as encoders visit them
        points = centres[kept[order]]
    Q = len(points)
    angle = torch.arange(M) * (2 * math.pi / M)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)  # (M, 2)
    steps = direction[:, None, None] * torch.arange(1, P + 1)[:, None]  # (M, 1, P, 2)
    offsets = steps + torch.randn(1, Q, M, L, P, 2, generator=g)
    reference = points[None, :, None].expand(1, Q, L, 2).contiguous()
    size = torch.tensor([(w, h) for h, w in levels])
    logits = torch.randn(1, Q, M, L * P, generator=g)

    def features(count: int) -> Tensor:
        return torch.randn(1, count, M, D, generator=g).to(device, dtype)

    return Problem(
        levels=levels,
        value=features(N),
        key=features(N),
        query=features(Q),
        reference=reference.to(device),
        offsets=offsets.to(device, dtype),
        logits=logits.to(device, dtype),
        locations=(reference[:, :, None, :, None] + offsets / size[:, None]).to(device),
        weights=logits.softmax(-1).view(1, Q, M, L, P).to(device, dtype),
    )


# ----------------------------------------------------------------- the usual formulations


def sample(value: Tensor, levels: tuple[tuple[int, int], ...], locations: Tensor) -> Tensor:
    """(B * M, D, Q, L * P) by one ``grid_sample`` per level, as everyone writes it.

    On the CPU in float32, as under autocast: in 16 bits torch's gives NaN beside the border.
    """
    dtype = value.dtype
    value = value.float() if value.device.type == "cpu" else value
    B, _, M, D = value.shape
    grids = (2 * locations - 1).to(value.dtype).transpose(1, 2).flatten(0, 1)  # (B * M, Q, L, P, 2)
    parts = value.split([h * w for h, w in levels], 1)
    sampled = [
        F.grid_sample(
            part.flatten(2).transpose(1, 2).reshape(B * M, D, h, w),
            grids[:, :, level],
            "bilinear",
            "zeros",
            align_corners=False,
        )
        for level, (part, (h, w)) in enumerate(zip(parts, levels))
    ]
    return torch.stack(sampled, -2).flatten(-2).to(dtype)


def plain_attention(p: Problem) -> Tensor:
    B, Q, M = p.weights.shape[:3]
    weights = p.weights.transpose(1, 2).reshape(B * M, 1, Q, -1)
    output = (sample(p.value, p.levels, p.locations) * weights).sum(-1)
    return output.view(B, -1, Q).transpose(1, 2).contiguous()


def plain_key_aware(p: Problem, own_keys: bool) -> Tensor:
    """Sample keys, sample values, softmax, sum: Lite DETR, Sec. 3.4. The published code samples twice
    also where the keys are the values."""
    B, Q, M, D = p.query.shape
    keys = p.key if own_keys else p.value
    keys = sample(keys, p.levels, p.locations).permute(0, 2, 3, 1)  # (B * M, Q, L * P, D)
    values = sample(p.value, p.levels, p.locations).permute(0, 2, 3, 1)
    query = p.query.transpose(1, 2).reshape(B * M, Q, 1, D)
    weights = (query @ keys.transpose(-1, -2) * D**-0.5).softmax(-1)  # (B * M, Q, 1, L * P)
    return (weights @ values).view(B, M, Q, D).transpose(1, 2).flatten(2)


def plain_splat(
    locations: list[Tensor], weights: list[Tensor], levels: tuple[tuple[int, int], ...]
) -> Tensor:
    """Four ``scatter_add`` of floats: Sparse DETR, Sec. 3.2."""
    where, share = torch.stack(locations, 1), torch.stack(weights, 1)  # (B, layers, Q, M, L, P, ...)
    size = where.new_tensor([(w, h) for h, w in levels])[:, None]
    start = where.new_tensor([sum(h * w for h, w in levels[:i]) for i in range(len(levels))])
    position = where * size
    corner = position.floor()
    found = where.new_zeros(len(where), sum(h * w for h, w in levels))
    for dx in (0, 1):
        for dy in (0, 1):
            cell = corner + corner.new_tensor([dx, dy])
            margin = (1 - (position - cell).abs()).prod(-1)
            inside = ((cell >= 0) & (cell < size)).all(-1)
            token = (cell[..., 1] * size[..., 0] + cell[..., 0] + start[:, None]).long()
            found.scatter_add_(1, (token * inside).flatten(1), (margin * share * inside).flatten(1))
    return found


# ------------------------------------------------------------------------------ contenders


def imported(name: str) -> ModuleType | None:
    """The module, if it is installed and works here; otherwise the comparison goes without it."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # made for another Python, or another torch
        print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def peers(named: list[str]) -> dict[str, Callable]:
    """Functions (value, shapes, level starts, locations, weights) -> output, by name.

    Those that are installed of ``torch-ms-deform-attn``, ``deformops`` (Python 3.12 on) and the extension
    that Deformable DETR's repository builds, and each ``NAME=MODULE:FUNCTION`` or ``NAME=FILE.py:FUNCTION``
    of ``named``.
    """
    found = {}
    if deformops := imported("deformops.registry"):
        found["deformops"] = deformops.msda
    if imported("MultiScaleDeformableAttention"):
        found["published"] = Published.apply
    if torch_ms_deform_attn := imported("torch_ms_deform_attn"):
        found["torch-ms-deform-attn"] = torch_ms_deform_attn.ms_deform_attn
    return found | dict(map(load, named))


class Published(torch.autograd.Function):
    """The two functions of the extension that Deformable DETR's repository builds, as one operator."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return importlib.import_module("MultiScaleDeformableAttention").ms_deform_attn_forward(*inputs, 64)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        module = importlib.import_module("MultiScaleDeformableAttention")
        inputs = ctx.saved_tensors
        value, locations, weights = module.ms_deform_attn_backward(*inputs, gradient.contiguous(), 64)
        return value, None, None, locations, weights


def load(text: str) -> tuple[str, Callable]:
    """``NAME=MODULE:FUNCTION`` or ``NAME=FILE.py:FUNCTION``."""
    try:
        name, place = text.split("=", 1)
        module, function = place.rsplit(":", 1)
    except ValueError:
        raise SystemExit(f"--peer {text}: expected NAME=MODULE:FUNCTION or NAME=FILE.py:FUNCTION") from None
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"peer_{Path(module).stem}", module)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        loaded = importlib.import_module(module)
    return name, getattr(loaded, function)


def _through(function: Callable, p: Problem) -> Tensor:
    """A peer's call; it takes the sizes as tensors."""
    shapes, starts = _sizes(p.levels, p.value.device)
    dtype = p.value.dtype
    return function(p.value, shapes, starts, p.locations.to(dtype), p.weights.to(dtype))


_SIZES: dict = {}


def _sizes(levels: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    if (levels, device) not in _SIZES:  # made once, as a model would
        areas = [h * w for h, w in levels]
        _SIZES[levels, device] = (
            torch.tensor(levels, device=device),
            torch.tensor([sum(areas[:i]) for i in range(len(areas))], device=device),
        )
    return _SIZES[levels, device]


def _attention(p: Problem) -> Tensor:
    return kernels.ms_deform_attn(p.value, p.levels, p.locations, p.weights)


def _prepared(p: Problem) -> Tensor:
    """Softmax and locations in eager PyTorch, then our op."""
    size = p.reference.new_tensor([(w, h) for h, w in p.levels])
    locations = p.reference[:, :, None, :, None] + p.offsets / size[:, None]
    weights = p.logits.softmax(-1).view(locations.shape[:-1])
    return kernels.ms_deform_attn(p.value, p.levels, locations, weights)


def _with_softmax_of_deformops(p: Problem) -> Tensor:
    """Locations in eager PyTorch, the rest in one call."""
    size = p.reference.new_tensor([(w, h) for h, w in p.levels])
    locations = p.reference[:, :, None, :, None] + p.offsets / size[:, None]
    shapes, starts = _sizes(p.levels, p.value.device)
    msda = importlib.import_module("deformops.registry").msda
    return msda(p.value, shapes, starts, locations, p.logits, method="softmax")


def _fused(p: Problem) -> Tensor:
    return kernels.ms_deform_attn_fused(p.value, p.levels, p.reference, p.offsets, p.logits)


def _key_aware(p: Problem, own_keys: bool) -> Tensor:
    key = p.key if own_keys else None
    return kernels.key_aware_deform_attn(p.query, key, p.value, p.levels, p.locations)


@dataclass(frozen=True)
class Task:
    """Contenders for one function; all but ``OURS`` are what it is measured against."""

    name: str
    contenders: dict[str, Callable[[Problem], Tensor]]
    leaves: tuple[str, ...]


def _key_aware_task(own_keys: bool) -> Task:
    return Task(
        "key-aware, own keys" if own_keys else "key-aware",
        {PLAIN: partial(plain_key_aware, own_keys=own_keys), OURS: partial(_key_aware, own_keys=own_keys)},
        ("query", *(["key"] if own_keys else []), "value", "locations"),
    )


def tasks(named_peers: list[str], compiled: bool, dtype: torch.dtype) -> list[Task]:
    attention: dict[str, Callable] = {PLAIN: plain_attention}
    if compiled:
        attention["torch.compile"] = torch.compile(plain_attention, dynamic=False)
    for name, function in peers(named_peers).items():
        attention[name] = partial(_through, function)
    attention[OURS] = _attention
    fused: dict[str, Callable] = {"eager preparation": _prepared}
    if "deformops" in attention:
        fused["deformops, its own softmax"] = _with_softmax_of_deformops
    fused[OURS] = _fused
    found = [
        Task("attention", attention, ("value", "locations", "weights")),
        Task("fused", fused, ("value", "offsets", "logits")),
        _key_aware_task(own_keys=False),
        _key_aware_task(own_keys=True),
    ]
    if dtype != torch.float32:
        for task in found:
            task.contenders[FULL] = task.contenders[OURS]
    return found


# ------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Result:
    task: str
    kind: str
    direction: str  # "forward" or "backward"
    timings: dict[str, Timing]


def check(task: Task, p: Problem, tolerance: float) -> None:
    """Every contender computes the same, or there is nothing to compare."""
    expected = None
    for name, function in task.contenders.items():
        leaves = p.leaves(*task.leaves)
        output = function(leaves)
        output.float().square().sum().backward()
        found = [output.detach(), *(getattr(leaves, n).grad for n in task.leaves)]
        expected = expected or found
        for what, a, b in zip(("output", *task.leaves), found, expected):
            error = ((a.float() - b.float()).norm() / b.float().norm()).item()
            if not error < tolerance:
                raise SystemExit(f"{task.name}: {what} of {name} differs by {error:.1e} (relative norm)")


def measure(
    task: Task, kind: str, levels: tuple[tuple[int, int], ...], dtype: torch.dtype, rounds: int, device: str
) -> list[Result]:
    def problems_in(dtype: torch.dtype) -> list[Problem]:
        return [problem(kind, levels, device, dtype, seed) for seed in range(4)]

    given = problems_in(dtype)
    problems = dict.fromkeys(task.contenders, given)
    if FULL in problems:
        problems[FULL] = problems_in(torch.float32)

    def forward(name: str, number: int) -> None:
        with torch.no_grad():
            task.contenders[name](problems[name][number % len(given)])

    results = [
        Result(
            task.name,
            kind,
            "forward",
            take_turns(
                {n: partial(forward, n) for n in task.contenders},
                rounds,
                device,
                f"{task.name}, {kind}, forward",
            ),
        )
    ]

    # The backward alone: graphs are kept, so that each call runs one of them again.
    graphs = {}
    for name, function in task.contenders.items():
        graphs[name] = []
        for p in problems[name]:
            leaves = p.leaves(*task.leaves)
            output = function(leaves)
            graphs[name].append((output, [getattr(leaves, n) for n in task.leaves], torch.randn_like(output)))

    def backward(name: str, number: int) -> None:
        output, inputs, grad = graphs[name][number % len(given)]
        torch.autograd.grad(output, inputs, grad, retain_graph=True)

    timings = take_turns(
        {n: partial(backward, n) for n in task.contenders}, rounds, device, f"{task.name}, {kind}, backward"
    )
    graphs.clear()

    def step(name: str) -> None:
        leaves = problems[name][0].leaves(*task.leaves)
        output = task.contenders[name](leaves)
        torch.autograd.grad(output, [getattr(leaves, n) for n in task.leaves], torch.ones_like(output))

    for name in task.contenders:
        timings[name].memory = peak_memory(partial(step, name), device)
    results.append(Result(task.name, kind, "backward", timings))
    return results


def measure_splat(kind: str, levels: tuple, rounds: int, device: str) -> Result:
    """The attention map of a six-layer decoder."""
    layers = [problem(kind, levels, device, torch.float32, seed) for seed in range(6)]
    locations, weights = [p.locations for p in layers], [p.weights for p in layers]
    contenders = {
        "scatter_add": lambda _: plain_splat(locations, weights, levels),
        OURS: lambda _: kernels.attention_map_splat(locations, weights, levels),
    }
    a, b = (call(0) for call in contenders.values())
    if not (a - b).norm() < 1e-5 * a.norm():
        raise SystemExit("attention-map splat: the results differ")
    return Result(
        "attention-map splat",
        f"6 x {kind}",
        "forward",
        take_turns(contenders, rounds, device, "attention-map splat"),
    )
