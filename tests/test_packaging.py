"""Wheel and checkout hold the package, and nothing else at the top. No network is used."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what packaging needs, in a folder from which nothing is installed."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("projects", "kernels", "configs", "requirements", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


def package_files(checkout):
    """Where each file of the package belongs in a wheel."""
    sources = {
        "sparse_detr": (checkout / "projects" / "sparse_detr", "**/*.py"),
        "sparse_detr/kernels": (checkout / "kernels", "*.py"),
        "sparse_detr/kernels/csrc": (checkout / "kernels" / "csrc", "**/*"),
        "sparse_detr/configs": (checkout / "configs", "**/*.py"),
    }
    for prefix, (folder, pattern) in sources.items():
        for path in folder.glob(pattern):
            if path.is_file():
                yield f"{prefix}/{path.relative_to(folder).as_posix()}"


def test_wheel_has_everything_and_no_other_top_level(checkout, tmp_path):
    pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools >= 70.1")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
        + ["--no-index", "-w", str(tmp_path), str(checkout)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = set(archive.namelist())
    assert "sparse_detr/configs/published.json" in names
    assert {name.split("/")[0] for name in names} - {"sparse_detr"} == {
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    }
    assert set(package_files(checkout)) <= names
    imports_all_parts(tmp_path / "installed", tmp_path)


def test_import_from_a_checkout_that_is_not_installed(checkout, tmp_path):
    imports_all_parts(checkout / "projects", tmp_path)


def imports_all_parts(folder, cwd):
    code = "import sparse_detr, sparse_detr.kernels as k, sparse_detr.configs as c; "
    code += "print(sparse_detr.__file__, *k.__path__, *c.__path__)"
    settings = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    output = subprocess.run(command, cwd=cwd, env=settings, check=True, capture_output=True, text=True).stdout
    top = folder if folder.name == "installed" else folder.parent
    for path in output.split():
        assert Path(path).is_relative_to(top), output
