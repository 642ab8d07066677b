"""The CUDA sources compile for sm_80 and sm_90, stay within their registers, link and load.

Needs nvcc, not a GPU. What the kernels compute is tested in test_cuda_on_cpu.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cuda_report

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "kernels" / "csrc" / "cuda"


needs_nvcc = pytest.mark.skipif(
    cuda_report.find_nvcc() is None, reason="no CUDA compiler (nvcc) on this machine"
)
needs_disassembler = pytest.mark.skipif(
    cuda_report.find_disassembler() is None,
    reason="cuobjdump is neither in the CUDA toolkit nor in Triton's wheel",
)


@pytest.fixture(scope="module")
def compiled(once):
    """The report on every kernel, and the folder of the object files."""

    def compile_all(folder):
        script = ROOT / "benchmarks" / "cuda_report.py"
        command = [sys.executable, script, "--arch", "80", "90", "--objects", folder]
        done = subprocess.run([*command, "--json", folder / "report.json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    folder = once("cuda", compile_all)
    kernels = json.loads((folder / "report.json").read_text())
    assert len(kernels) > 200
    return [cuda_report.Kernel(**k) for k in kernels], folder


@needs_nvcc
def test_nothing_spills(compiled):
    spilling = [k for k in compiled[0] if k.spilled_bytes]
    assert not spilling, spilling


# Registers per thread; at 65 536 per multiprocessor and 256 threads per block, 48 leave room for
# five blocks, 64 for four, 80 for three, 128 for two. (architecture, kernel) -> ceiling.
CEILINGS = [
    (90, r"forward (?!float64)", 48),
    (80, r"forward (?!float64)", 64),
    (None, r"(aggregated )?backward (?!float64).*(?<!deterministic)$", 64),
    (None, r"aggregated backward .* deterministic", 80),
    (None, r"key aware forward \w+ x\d+ keys=values", 64),
    (None, r"key aware backward float32 x\d+ keys=values$", 80),
    (None, r"splat", 32),
    (None, r"", 132),
]


@needs_nvcc
def test_registers_leave_room_for_enough_warps(compiled):
    for arch, pattern, ceiling in CEILINGS:
        kernels = [k for k in compiled[0] if arch in (None, k.arch) and re.match(pattern, k.name)]
        assert kernels, pattern
        worst = max(kernels, key=lambda k: k.registers)
        assert worst.registers <= ceiling, worst


@needs_nvcc
def test_shared_memory_leaves_room_for_l1(compiled):
    """100 of the 256 KB of an H100's multiprocessor, whichever kernel runs; blocks fill it."""
    for kernel in compiled[0]:
        if kernel.arch != 90 or "float64" in kernel.name:
            continue
        softmax = 64 * 17 * 4 if re.search("aggregated.*fused", kernel.name) else 0  # L P = 16
        blocks = min(8, 65536 // (256 * (kernel.registers + 7) // 8 * 8))
        shared = blocks * (kernel.shared_bytes + softmax + 1024) / 1024
        carveout = next(x for x in (0, 8, 16, 32, 64, 100, 132, 164, 196, 228) if x >= shared)
        assert 256 - carveout >= (92 if "x64" in kernel.name else 100), kernel


@needs_nvcc
@needs_disassembler
def test_instructions_per_sample(compiled):
    """Beside 82 (forward) and 272 (backward) of the published kernel on sm_90."""
    of = {k.name: k for k in compiled[0] if k.arch == 90}
    assert of["forward float32 x32 given"].gather <= 10
    assert of["forward bfloat16 x32 given"].gather <= 12
    assert of["backward float32 x32 given"].gather <= 34
    for name in ("forward float32 x32 fused", "backward float32 x32 fused"):
        kernel = of[name]
        assert kernel.prepare < kernel.gather
    for name, most in (("float32 x32 given", 84), ("bfloat16 x32 given", 84)):
        kernel = of[f"aggregated backward {name}"]
        assert kernel.gather + kernel.sum + kernel.prepare <= most, kernel


@needs_nvcc
@needs_disassembler
def test_reductions_have_no_return_value(compiled):
    """RED, not ATOM: an addition whose old value nobody waits for; four floats each on sm_90."""
    for kernel in compiled[0]:
        adds = "backward" in kernel.name or re.match(r"splat float", kernel.name)
        in_memory = [x for x in kernel.atomics if not x.startswith("ATOMS")]
        assert bool(in_memory) == bool(adds), kernel
        assert all(x.startswith("RED") for x in in_memory), kernel
        if kernel.arch == 90 and re.search(r" x\d+ (?!.*deterministic)", kernel.name):
            assert all("F32x4" in x for x in in_memory), kernel


@needs_nvcc
@needs_disassembler
def test_shared_memory_adds_integers_only(compiled):
    """Of floats it has no addition: they would become loops of compare-and-swap."""
    for kernel in compiled[0]:
        shared = [x for x in kernel.atomics if x.startswith("ATOMS")]
        assert bool(shared) == kernel.name.startswith("aggregated"), kernel
        assert all(x == "ATOMS.ADD" for x in shared), kernel


@needs_nvcc
def test_links_and_loads_without_a_gpu(compiled):
    """The bindings find every launcher, and register a kernel for every schema of op.py."""
    folder = compiled[1]
    torch_home = Path(torch.__file__).parent
    cuda_home = cuda_report.cuda_home()
    if not list((torch_home / "lib").glob("libc10_cuda*")):
        pytest.skip("torch is built without CUDA")
    include = torch_home / "include"
    subprocess.run(
        [
            "c++",
            "-std=c++20",
            "-O0",
            "-fPIC",
            "-c",
            CSRC / "bindings_cuda.cpp",
            "-o",
            folder / "bindings.o",
            f"-I{include}",
            f"-I{include}/torch/csrc/api/include",
            f"-I{cuda_home}/include",
        ],
        check=True,
    )
    library = folder / "library.so"
    subprocess.run(
        [
            "c++",
            "-shared",
            *folder.glob("*.o"),
            "-o",
            library,
            f"-L{torch_home}/lib",
            "-lc10",
            "-lc10_cuda",
            "-ltorch_cpu",
            "-ltorch_cuda",
            "-ltorch",
            f"-L{cuda_home}/lib64",
            "-lcudart",
            "-Wl,--no-undefined",
        ],
        check=True,
    )
    check = (
        "import sys, torch; from sparse_detr.kernels import op;"
        "torch.ops.load_library(sys.argv[1]);"
        "names = [s.split('(')[0] for s in op.SCHEMAS];"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print([n for n in names if not has('sparse_detr::' + n, 'CUDA')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "projects")}
    done = subprocess.run(
        [sys.executable, "-c", check, library], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
