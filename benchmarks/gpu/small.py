"""Every CUDA kernel once, on small inputs, compared with plain PyTorch: for compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/gpu/small.py

Queries as tiles and as a list, gradients per corner, per block and in fixed point, 16-bit values.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import _checkout
import torch

from sparse_detr.kernels import (
    attention_map_splat,
    key_aware_deform_attn,
    ms_deform_attn,
    ms_deform_attn_fused,
    reference,
    status,
)

SHAPES = ((17, 24), (9, 12), (5, 6))
TOKENS = sum(h * w for h, w in SHAPES)


def inputs(queries: int, dtype: torch.dtype, channels: int, device: str, images: int, heads: int):
    g = torch.Generator().manual_seed(queries)

    def rand(*size, like=torch.float32):
        return (torch.rand(*size, generator=g) * 1.2 - 0.1).to(device, like).requires_grad_()

    B, M, L, P = images, heads, len(SHAPES), 4
    value = rand(B, TOKENS, M, channels, like=dtype)
    return {
        "given": (
            ms_deform_attn,
            reference.ms_deform_attn,
            (value, SHAPES, rand(B, queries, M, L, P, 2), rand(B, queries, M, L, P)),
        ),
        "fused": (
            ms_deform_attn_fused,
            reference.ms_deform_attn_fused,
            (
                value,
                SHAPES,
                rand(B, queries, L, 4),
                rand(B, queries, M, L, P, 2, like=dtype),
                rand(B, queries, M, L * P, like=dtype),
            ),
        ),
        "key-aware": (
            key_aware_deform_attn,
            lambda *x: reference.key_aware_deform_attn(*x)[0],
            (rand(B, queries, M, channels, like=dtype), None, value, SHAPES, rand(B, queries, M, L, P, 2)),
        ),
        "key-aware, keys": (
            key_aware_deform_attn,
            lambda *x: reference.key_aware_deform_attn(*x)[0],
            (
                rand(B, queries, M, channels, like=dtype),
                rand(B, TOKENS, M, channels, like=dtype),
                value,
                SHAPES,
                rand(B, queries, M, L, P, 2),
            ),
        ),
    }


def compare(name: str, function, plain, arguments) -> None:
    leaves = [x for x in arguments if isinstance(x, torch.Tensor)]
    found = function(*arguments)
    weight = torch.linspace(-1, 1, found.numel(), device=found.device).view(found.shape)
    gradients = torch.autograd.grad((found * weight.to(found.dtype)).sum(), leaves)
    wide = [x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    expected = plain(*wide)
    wanted = torch.autograd.grad((expected * weight).sum(), [x for x in wide if isinstance(x, torch.Tensor)])
    tolerance = 1e-4 if found.dtype == torch.float32 else 3e-2
    for x, y in zip((found, *gradients), (expected, *wanted), strict=True):
        error = ((x.double() - y).norm() / y.norm()).item()
        assert error < tolerance, f"{name}: relative error {error:.1e}"  # NaN fails, too


def main() -> None:
    parser = _checkout.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    backend = status(device, load=True).backend
    assert device == "cpu" or backend == "cuda", status(device).reason
    torch.manual_seed(0)
    # Tiles are taken where they make 512 blocks.
    runs = [(TOKENS, torch.float32, 32, 4, 8), (70, torch.bfloat16, 32, 1, 2), (70, torch.float32, 24, 1, 2)]
    done = 0
    for queries, dtype, channels, images, heads in runs if device == "cuda" else runs[1:]:
        for path in ("direct", "aggregated", "deterministic"):
            os.environ["SPARSE_DETR_BACKWARD"] = "aggregated" if path == "deterministic" else path
            torch.use_deterministic_algorithms(path == "deterministic", warn_only=True)
            for name, case in inputs(queries, dtype, channels, device, images, heads).items():
                compare(f"{name}, {path}, {dtype}, {channels} channels", *case)
                done += 1
    torch.use_deterministic_algorithms(False)
    locations, weights = torch.rand(2, 50, 2, 3, 4, 2), torch.rand(2, 50, 2, 3, 4)
    found = attention_map_splat(locations.to(device), weights.to(device), SHAPES)
    assert torch.equal(found.cpu(), reference.attention_map_splat([locations], [weights], SHAPES))
    print(f"{done + 1} calls on {device} ({backend}) agree with plain PyTorch")


if __name__ == "__main__":
    _checkout.run(main)
