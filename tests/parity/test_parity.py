"""The published implementations' own numbers: outputs, decisions, losses, gradients."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.replay import find_replay
from tests.parity.replay.case import Case

ROOT = Path(__file__).resolve().parents[2]


CASES = sorted(p for p in (Path(__file__).parent / "cases").rglob("*.json") if p.with_suffix(".npz").exists())


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_case(path):
    case = Case.load(path, torch.float64)
    find_replay(case)(case)
    assert case.checks
    failed = [f"{c.name}: {c.error:.1e} > {c.tolerance:.1e}" for c in case.checks if not c.passed]
    assert not failed, "\n".join(failed)


def run_tool(*args):
    return subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tools" / "parity.py", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_tool_reports_and_fails_on_a_wrong_case(tmp_path):
    """One good case, one whose stored output was changed, one that cannot be read."""
    source = next(p for p in CASES if p.stem == "op_core")
    for name, change in (("good", 0.0), ("wrong", 1e-3)):
        (tmp_path / f"{name}.json").write_text(source.read_text())
        with np.load(source.with_suffix(".npz")) as arrays:
            arrays = dict(arrays)
        arrays["output"] = arrays["output"] + change
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "broken.json").write_text("{")
    np.savez(tmp_path / "broken.npz")
    done = run_tool(tmp_path, "--json", tmp_path / "result.json")
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1] == "parity: 1 passed, 2 failed"
    results = {Path(r["path"]).stem: r for r in json.loads((tmp_path / "result.json").read_text())}
    assert results["good"]["passed"] and not results["wrong"]["passed"]
    assert [f["array"] for f in results["wrong"]["failed"]] == ["output"]
    assert "JSONDecodeError" in results["broken"]["error"]


def test_float32_stays_within_its_noise_floors():
    names = ("op_core", "op_msdeform_ref2", "op_msdeform_ref4", "deformable_r50_two_stage")
    done = run_tool("--dtype", "float32", *[p for p in CASES if p.stem in names])
    assert done.returncode == 0, done.stdout


def test_no_case_is_no_success(tmp_path):
    done = run_tool(tmp_path)
    assert done.returncode == 1 and "no cases found" in done.stdout
