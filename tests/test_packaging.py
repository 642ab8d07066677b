"""Wheel and checkout hold the package, and nothing else at the top; the wheel's console command is all that
a user needs. No network is used."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from sparse_detr import cli
from sparse_detr.cli.flags import described

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


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools >= 70.1")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
        + ["--no-index", "-w", str(folder), str(checkout)],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return wheel


def test_wheel_has_everything_and_no_other_top_level(checkout, wheel, tmp_path):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "sparse_detr/configs/published.json" in names
    assert {name.split("/")[0] for name in names} - {"sparse_detr"} == {
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    }
    assert set(package_files(checkout)) <= names
    imports_all_parts(wheel.parent / "installed", tmp_path)


@pytest.fixture
def call(wheel, tmp_path):
    """Calls the wheel's console command in an empty folder, through a script like the one pip makes."""
    installed = wheel.parent / "installed"
    (entry,) = metadata.Distribution.at(next(installed.glob("*.dist-info"))).entry_points
    script = wheel.parent / entry.name
    script.write_text(
        f"import sys\nfrom {entry.module} import {entry.attr}\n"
        f"if __name__ == '__main__':\n    sys.exit({entry.attr}())\n"
    )
    settings = {**os.environ, "PYTHONPATH": str(installed), "PYTHONWARNINGS": "ignore"}
    settings["CUDA_VISIBLE_DEVICES"] = ""

    def run(*arguments, status=0):
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    return run


def test_the_console_command_is_a_map_and_needs_nothing_else(call, tmp_path):
    lines = [line.split() for line in call("--help").splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines] == list(cli.COMMANDS)
    assert call("analyse", status=1) == (
        "error: there is no command 'analyse': did you mean analyze? sparse-detr --help lists them\n"
    )
    table = call("analyze", "--config-file", "quick/sparse_detr_shapes", "--size", "64x64")
    assert "transformer.encoder" in table and "quick/sparse_detr_shapes at 64x64" in table
    assert list(tmp_path.iterdir()) == []


def test_commands_are_modules_and_scripts_of_the_checkout():
    for name, (module, script, purpose) in cli.COMMANDS.items():
        source = (ROOT / "projects" / "sparse_detr" / "cli" / f"{module}.py").read_text()
        assert re.search(r"^def main\(", source, re.M) and len(purpose) < 70
        if script:
            assert f'run("{name}")' in (ROOT / script).read_text()


def test_help_loads_nothing_heavy_and_shows_how_it_was_called(monkeypatch):
    code = "import sys; from sparse_detr.cli import main; main(['--help']); print('torch' in sys.modules)"
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "projects")}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    for called, shown in (
        ("sparse-detr analyze", "sparse-detr analyze"),
        ("x/analyze_model.py", "python tools/analyze_model.py"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        assert f"    {shown} --depth 3" in described("Text.\n\n    sparse-detr analyze --depth 3\n")


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
