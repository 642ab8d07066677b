"""The CUDA sources compile for the GPUs they are written for, within their register budgets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import cuda_report  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_report.find_nvcc() is None, reason="no CUDA compiler (nvcc)"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return cuda_report.report([80, 90], tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("arch", [80, 90])
def test_no_kernel_spills(kernels, arch):
    mine = [k for k in kernels if k.arch == arch]
    assert len(mine) > 20
    assert [k.name for k in mine if k.spilled_bytes] == []


@pytest.mark.parametrize("arch", [80, 90])
def test_registers_leave_room_for_enough_warps(kernels, arch):
    """Float32 and 16-bit values; 64 registers leave room for 32 warps on a multiprocessor, 128 for 16."""
    ceilings = {"forward": 64, "backward": 64, "key aware forward": 104, "key aware backward": 120}
    for name, ceiling in ceilings.items():
        mine = [k for k in kernels if k.arch == arch and k.name.startswith(name + " ")
                and "float64" not in k.name]
        assert mine, name
        over = {k.name: k.registers for k in mine if k.registers > ceiling}
        assert not over, f"{name}: more than {ceiling} registers: {over}"


def test_the_extension_links_and_registers_without_a_gpu(tmp_path):
    environment = dict(os.environ, SPARSE_DETR_OPS="cuda", TORCH_CUDA_ARCH_LIST="9.0",
                       SPARSE_DETR_CACHE=str(tmp_path), PYTHONPATH=str(ROOT / "projects"))
    code = "from sparse_detr.kernels import status; print(status('cuda', load=True).backend)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "cuda"
