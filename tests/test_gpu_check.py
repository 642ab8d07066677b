"""benchmarks/gpu_check.sh, rehearsed without a GPU: the same scripts on the CPU with small sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"


def rehearse(target, *arguments):
    done = subprocess.run(
        [SCRIPT, "--dry-run", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OUT": str(target), "PYTHON": sys.executable},
    )
    summary = json.loads((target / "gpu_check.json").read_text())
    return done, {x["name"]: x for x in summary["stages"]}, summary


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """All but the build (test_cuda_compile.py compiles the same sources) and most of the whole models."""
    skipped = "build,op_bf16,model_tests,model,model_dino,batch,compile,learn"
    done, stages, summary = rehearse(tmp_path, "--skip", skipped)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    assert {n: x["state"] for n, x in stages.items()} == {
        "machine": "passed",
        "packages": stages["packages"]["state"],
        "tests": "passed",
        "targets": "passed",
        "micro": stages["micro"]["state"],
        "peers": "skipped",
        "op": "passed",
        "memcheck": "passed",
        "racecheck": "skipped",
        "batch_dino": "passed",
        "photos": "skipped",
    }
    assert stages["micro"]["state"] == "passed" or "no nvcc" in stages["micro"]["last line"]
    assert summary["op"]["results"] and summary["targets"]["results"]
    assert not any(x["verdict"] for x in summary["targets"]["results"])  # a CPU meets no target
    assert "no number below is a GPU's" in (tmp_path / "gpu_check.md").read_text()


def test_a_failing_stage_stops_no_other_and_is_reported(tmp_path):
    """No time is left for the first stage that would need more than the budget."""
    done, stages, _ = rehearse(tmp_path, "--only", "machine,packages", "--budget", "0")
    assert done.returncode == 1
    assert [x["state"] for x in stages.values()] == ["timed out", "timed out"]
    assert "no time left" in (tmp_path / "log.txt").read_text()


def test_a_part_has_its_stages_and_its_folder(tmp_path):
    subprocess.run(
        [SCRIPT, "--dry-run", "--part", "correctness", "--budget", "0"],
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
    )
    stages = json.loads((tmp_path / "correctness" / "gpu_check.json").read_text())["stages"]
    names = "machine packages build tests model_tests memcheck racecheck"
    assert [x["name"] for x in stages] == names.split()
    done = subprocess.run([SCRIPT, "--part", "all"], capture_output=True, text=True)
    assert (
        done.returncode == 2 and "expected correctness, operators, models, batches or learning" in done.stderr
    )


def test_an_unknown_flag_shows_the_usage():
    done = subprocess.run([SCRIPT, "--fast"], capture_output=True, text=True)
    assert done.returncode == 2 and "benchmarks/gpu_check.sh --dry-run" in done.stdout


def test_the_published_kernel_is_packed_for_a_torch_of_today(tmp_path):
    script = [sys.executable, ROOT / "benchmarks" / "gpu" / "published.py", "pack"]
    ops, folder = tmp_path / "ops", tmp_path / "packed"
    done = subprocess.run([*script, ops, folder], capture_output=True, text=True)
    assert done.returncode and "expected models/ops of Deformable DETR's repository" in done.stderr
    (ops / "src" / "cuda").mkdir(parents=True)
    (ops / "src" / "vision.cpp").write_text("module\n")
    (ops / "src" / "cuda" / "a.cu").write_text(
        "#include <THC/THCAtomics.cuh>\n"
        "AT_ASSERTM(value.type().is_cuda(), 1);\n"
        "AT_DISPATCH_FLOATING_TYPES(value.type(), x.data<float>() * 2)\n"
    )
    subprocess.run([*script, ops, folder], check=True)
    assert (folder / "vision.cpp").read_text() == "module\n"
    assert (folder / "cuda" / "a.cu").read_text() == (
        "#include <ATen/cuda/Atomic.cuh>\n"
        "TORCH_CHECK(value.is_cuda(), 1);\n"
        "AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), x.data_ptr<float>() * 2)\n"
    )
