"""The report on an installation. No network is used."""

import json
import subprocess
import sys
from pathlib import Path

from sparse_detr.cli import check_install

ROOT = Path(__file__).resolve().parent.parent


def run_check(*arguments):
    script = ROOT / "tools" / "check_install.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300
    )


def test_report_on_this_machine():
    import torch

    result = run_check("--json")
    report = json.loads(result.stdout)
    assert result.returncode == 0 and report["ok"], report["problems"]
    versions = {name: version for name, version, _ in report["rows"]}
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "detectron2", "numpy", "compiler", "nvcc", "GPU"} <= set(versions)
    assert report["op"]["cpu"]["backend"] in ("cpp-cpu", "reference")
    assert report["op"]["cpu"]["reason"]


def test_report_names_what_is_missing_and_the_fix(monkeypatch, capsys):
    find = check_install.is_importable
    monkeypatch.setattr(check_install, "is_importable", lambda m: m != "pycocotools" and find(m))
    monkeypatch.setattr(check_install, "check_package", lambda report: None)  # no build here
    monkeypatch.setattr(sys, "argv", ["check_install.py"])
    assert check_install.main() == 1
    output = capsys.readouterr().out
    assert "MISSING: pycocotools is missing" in output
    assert f"fix: {sys.executable} -m pip install 'pycocotools>=2.0.6'" in output


def test_report_on_an_op_that_cannot_be_built(monkeypatch):
    from sparse_detr import kernels

    reason = "no C++ compiler (c++ is not on the PATH): install g++, or set CXX"
    unbuilt = kernels.Status("reference", reason)
    monkeypatch.setattr(kernels, "status", lambda device_type, *, load: unbuilt)
    report = check_install.Report()
    check_install.check_package(report)
    assert reason in report.problems[0]["what"] and report.ok


def test_report_finds_the_tools_that_the_build_finds(tmp_path, monkeypatch):
    """A compiler behind a wrapper, and the nvcc of a CUDA_HOME that is not on the PATH."""
    monkeypatch.setenv("CXX", "ccache g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    for tool, does in (
        ("ccache", '"$@"'),
        ("g++", "echo g++ 12.2"),
        ("cuda/bin/nvcc", "echo release 13.0, V13"),
    ):
        (tmp_path / tool).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / tool).chmod(0o755)
    report = check_install.Report()
    check_install.check_build_tools(report)
    assert [row[:2] for row in report.rows] == [("compiler", "g++ 12.2"), ("nvcc", "13.0")]


def test_report_on_an_outdated_package(monkeypatch):
    real = check_install.installed_version
    fake = {"torch": "2.1.0"}
    monkeypatch.setattr(check_install, "installed_version", lambda n: fake.get(n) or real(n))
    report = check_install.Report()
    check_install.check_requirements(report)
    assert [p["what"] for p in report.problems] == ["torch 2.1.0 is installed, torch>=2.6 is needed"]
    assert not report.ok
