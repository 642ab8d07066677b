"""Runs the CUDA kernels on the CPU: the .cu files compiled by the host compiler (cuda_runtime.h).

Tensors are passed between guard regions, so that a kernel that reads or writes beyond its arrays
shows up: reads find NaN, writes damage the guard, and outputs start as NaN.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "kernels" / "csrc" / "cuda"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # enum Dtype
GUARD = 256  # numbers; keeps 16-byte alignment for every dtype


LIBRARIES = "cuda_on_cpu_90.so", "cuda_on_cpu_80.so"


def build(folder: Path) -> None:
    """``LIBRARIES``: the kernels compiled for the CPU as if for sm_90, with backwards for sm_80."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    include = Path(torch.__file__).parent / "include"

    def compile(source: Path, arch: int) -> Path:
        target = folder / f"{source.stem}_{arch}.o"
        subprocess.run(
            [
                compiler,
                "-std=c++17",
                "-O0",
                "-fPIC",
                "-ffp-contract=off",
                "-w",
                f"-DEMULATED_ARCH={arch}",
                f"-I{HERE}",
                f"-I{CSRC}",
                f"-I{include}",
                "-x",
                "c++",
                "-c",
                source,
                "-o",
                target,
            ],
            check=True,
        )
        return target

    def link(objects: list[Path], name: str) -> None:
        # Symbols stay local: the two libraries define the same ones.
        command = [compiler, "-shared", "-Wl,-Bsymbolic", *objects, "-o", folder / name]
        subprocess.run(command, check=True)

    backwards = sorted(CSRC.glob("backward*.cu"))
    others = [*sorted(set(CSRC.glob("*.cu")) - set(backwards)), HERE / "entry.cpp"]
    jobs = [(x, 900) for x in (*backwards, *others)] + [(x, 800) for x in backwards]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: compile(*job), jobs))
    of_90, of_80 = objects[: len(backwards)], objects[-len(backwards) :]
    rest = objects[len(backwards) : -len(backwards)]
    for objects, name in zip((of_90, of_80), LIBRARIES, strict=True):
        link([*objects, *rest], name)


def load(folder: Path) -> tuple[ctypes.CDLL, ...]:
    """What ``build`` has put there."""
    return tuple(ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_LOCAL) for name in LIBRARIES)


class _Sizes(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("images", "queries", "heads", "channels", "points", "levels")]
    _fields_ += [
        ("shapes", ctypes.POINTER(ctypes.c_int64)),
        ("tiled_from", ctypes.c_int),
        ("aggregate", ctypes.c_int),
    ]


class _Samples(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("locations", "weights", "reference", "offsets", "logits")]
    _fields_ += [("boxes", ctypes.c_bool), ("dtype", ctypes.c_int)]


class _SampleGradients(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("locations", "weights", "offsets", "logits", "pixels")]


class _GradientMap(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("sum", "fixed", "bound")]


class CudaOnCpu:
    """The launchers of launch.h on CPU tensors, with the semantics of `torch.ops.sparse_detr.*`.

    `descending`: lanes of a warp take their turns from the last to the first.
    """

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.vector_reductions.restype = ctypes.c_int64

    def vector_reductions(self) -> int:
        """Additions of four floats to memory, of all lanes and calls so far."""
        return self.library.vector_reductions()

    def ms_deform_attn(self, value, shapes, locations, weights, tiled_from=-1, descending=False):
        call = _Call(self, value, shapes, locations, tiled_from, descending)
        samples = call.given(locations, weights)
        return call.forward(samples)

    def ms_deform_attn_fused(
        self, value, shapes, reference, offsets, logits, tiled_from=-1, descending=False
    ):
        call = _Call(self, value, shapes, offsets, tiled_from, descending)
        return call.forward(call.fused(reference, offsets, logits))

    def ms_deform_attn_backward(
        self,
        grad_output,
        value,
        shapes,
        locations,
        weights,
        tiled_from=-1,
        descending=False,
        deterministic=False,
        aggregate=False,
    ):
        call = _Call(self, value, shapes, locations, tiled_from, descending, aggregate)
        found = _SampleGradients()
        grad_locations, found.locations = call.output(locations)
        grad_weights, found.weights = call.output(weights)
        bound = grad_output.abs().max().to(locations.dtype) * weights.abs().max()
        grad_value, _ = call.backward(
            grad_output, call.given(locations, weights), found, bound if deterministic else None
        )
        return grad_value, grad_locations.get(), grad_weights.get()

    def ms_deform_attn_fused_backward(
        self,
        grad_output,
        value,
        shapes,
        reference,
        offsets,
        logits,
        tiled_from=-1,
        descending=False,
        deterministic=False,
        aggregate=False,
    ):
        call = _Call(self, value, shapes, offsets, tiled_from, descending, aggregate)
        found = _SampleGradients()
        grad_offsets, found.offsets = call.output(offsets)
        grad_logits, found.logits = call.output(logits)
        pixels, found.pixels = call.output(offsets.to(reference.dtype))
        grad_reference, pointer = call.output(reference)
        bound = grad_output.abs().max().to(reference.dtype)
        samples = call.fused(reference, offsets, logits)
        grad_value, _ = call.backward(grad_output, samples, found, bound if deterministic else None, pointer)
        return grad_value, grad_reference.get(), grad_offsets.get(), grad_logits.get()

    def key_aware_deform_attn(self, query, key, value, shapes, locations, tiled_from=-1, descending=False):
        call = _Call(self, value, shapes, locations, tiled_from, descending)
        B, Q, M, D = query.shape
        output, output_pointer = call.output(query.reshape(B, Q, M * D))
        lse, lse_pointer = call.output(torch.empty(B, Q, M, dtype=locations.dtype))
        call.run(
            "run_key_aware_forward",
            call.input(query),
            call.input(key),
            call.input(value),
            call.input(locations),
            output_pointer,
            lse_pointer,
        )
        return output.get(), lse.get()

    def key_aware_deform_attn_backward(
        self,
        grad_output,
        output,
        lse,
        query,
        key,
        value,
        shapes,
        locations,
        tiled_from=-1,
        descending=False,
        bound=None,
    ):
        call = _Call(self, value, shapes, locations, tiled_from, descending)
        grad_query, query_pointer = call.output(query.to(lse.dtype))
        grad_locations, locations_pointer = call.output(locations)
        key_map, key_sum = call.map(value if key is not None else None, bound)
        value_map, value_sum = call.map(value, bound)
        call.run(
            "run_key_aware_backward",
            call.input(grad_output),
            call.input(output),
            call.input(lse),
            call.input(query),
            call.input(key),
            call.input(value),
            call.input(locations),
            query_pointer,
            ctypes.byref(key_map),
            ctypes.byref(value_map),
            locations_pointer,
        )
        grad_key = None if key is None else call.finish(key_sum, bound)
        return grad_query.get(), grad_key, call.finish(value_sum, bound), grad_locations.get()

    def attention_map_splat(self, locations, weights, shapes):
        B, tokens = locations[0].shape[0], sum(h * w for h, w in shapes)
        fixed = _Guarded(torch.zeros(B, tokens, dtype=torch.int64), guard=77)
        for xy, share in zip(locations, weights, strict=True):
            value = torch.empty(B, tokens, xy.shape[2], 1, dtype=xy.dtype)
            call = _Call(self, value, shapes, xy, -1, False)
            call.run("run_splat", call.input(xy), call.input(share), fixed.pointer)
        result = torch.empty(B, tokens, dtype=locations[0].dtype)
        error = self.library.run_splat_to_float(
            DTYPES.index(result.dtype),
            fixed.pointer,
            ctypes.c_int64(result.numel()),
            ctypes.c_void_p(result.data_ptr()),
        )
        assert error == 0
        fixed.get()
        return result


class _Guarded:
    """A tensor inside a larger buffer whose other numbers must stay what they are."""

    def __init__(self, content: Tensor, guard: float = float("nan")):
        self.buffer = torch.full((content.numel() + 2 * GUARD,), guard, dtype=content.dtype)
        self.tensor = self.buffer[GUARD : GUARD + content.numel()].view(content.shape)
        self.tensor.copy_(content)
        self.guard = guard
        self.pointer = ctypes.c_void_p(self.tensor.data_ptr())

    def get(self) -> Tensor:
        around = torch.cat([self.buffer[:GUARD], self.buffer[-GUARD:]])
        expected = torch.full_like(around, self.guard)
        assert torch.equal(around.isnan(), expected.isnan()), "wrote outside the array"
        assert torch.equal(around.nan_to_num(), expected.nan_to_num()), "wrote outside the array"
        return self.tensor.clone()


class _Call:
    def __init__(self, owner, value, shapes, samples, tiled_from, descending, aggregate=False):
        B, _, M, D = value.shape
        _, Q, _, L, P, _ = samples.shape
        flat = [x for pair in shapes for x in pair]
        self.shapes = (ctypes.c_int64 * len(flat))(*flat)
        self.sizes = _Sizes(B, Q, M, D, P, L, self.shapes, tiled_from, aggregate)
        self.library, self.value, self.descending = owner.library, value, descending
        self.alive = []

    def input(self, x: Tensor | None):
        if x is None:
            return None
        self.alive.append(_Guarded(x))
        return self.alive[-1].pointer

    def output(self, like: Tensor):
        guarded = _Guarded(torch.full_like(like, float("nan")))
        return guarded, guarded.pointer

    def run(self, name: str, *args) -> None:
        self.library.set_descending(int(self.descending))
        function = getattr(self.library, name)
        error = function(ctypes.byref(self.sizes), DTYPES.index(self.value.dtype), *args)
        assert error == 0, f"{name} returned CUDA error {error}"

    def given(self, locations, weights) -> _Samples:
        return _Samples(locations=self.input(locations), weights=self.input(weights))

    def fused(self, reference, offsets, logits) -> _Samples:
        return _Samples(
            reference=self.input(reference),
            offsets=self.input(offsets),
            logits=self.input(logits),
            boxes=reference.shape[-1] == 4,
            dtype=DTYPES.index(offsets.dtype),
        )

    def forward(self, samples: _Samples) -> Tensor:
        s = self.sizes
        output, pointer = self.output(
            torch.empty(s.images, s.queries, s.heads * s.channels, dtype=self.value.dtype)
        )
        self.run("run_forward", self.input(self.value), ctypes.byref(samples), pointer)
        return output.get()

    def map(self, like: Tensor | None, bound: Tensor | None):
        """A zeroed gradient map, in fixed point where a bound is given."""
        if like is None:
            return _GradientMap(), None
        accumulator = torch.float64 if like.dtype == torch.float64 else torch.float32
        dtype = accumulator if bound is None else torch.int64
        guarded = _Guarded(torch.zeros(like.shape, dtype=dtype), guard=77)
        self.alive.append(guarded)
        if bound is None:
            return _GradientMap(sum=guarded.pointer), guarded
        return _GradientMap(fixed=guarded.pointer, bound=self.input(bound)), guarded

    def finish(self, guarded: _Guarded, bound: Tensor | None) -> Tensor:
        total = guarded.get()
        if bound is None:
            return total.to(self.value.dtype)
        result, pointer = self.output(torch.empty(total.shape, dtype=self.value.dtype))
        self.run(
            "run_fixed_to_float", guarded.pointer, self.input(bound), ctypes.c_int64(total.numel()), pointer
        )
        return result.get()

    def backward(self, grad_output, samples, found, bound=None, reference_pointer=None):
        gradient_map, total = self.map(self.value, bound)
        self.run(
            "run_backward",
            self.input(grad_output),
            self.input(self.value),
            ctypes.byref(samples),
            ctypes.byref(gradient_map),
            ctypes.byref(found),
            reference_pointer,
        )
        return self.finish(total, bound), total
