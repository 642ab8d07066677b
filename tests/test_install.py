"""Setting up the environment, checking it, and packaging. No network is used."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MINORS = (10, 11, 12, 13)
REQUIREMENT_FILES = ("runtime", "detectron2-runtime", "dev")


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


install_env = load_tool("install_env")
check_install = load_tool("check_install")


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


@pytest.fixture
def env(tmp_path):
    """An environment that sees the packages of the running Python."""
    environment = install_env.Environment(tmp_path / "env")
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    environment.python.chmod(0o755)
    environment.state.mkdir()
    return environment


@pytest.fixture
def pip_calls(monkeypatch):
    """Arguments of the calls of pip that would have been made."""
    calls = []
    monkeypatch.setattr(install_env, "pip", lambda env, *arguments: calls.append(arguments))
    return calls


# Stamp


def test_environment_is_current_only_with_its_stamp(env, monkeypatch):
    monkeypatch.setattr(env, "absent", lambda modules: [])
    assert not env.is_current()
    env.stamp.write_text("of an older state")
    assert not env.is_current()
    env.stamp.write_text(env.fingerprint())
    assert env.is_current()


def test_fingerprint_follows_requirements_and_place(env, checkout, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    seen = {env.fingerprint()}
    monkeypatch.setattr(install_env, "ROOT", copy)
    seen.add(env.fingerprint())  # an editable installation points to one place
    for file in ("requirements/runtime.txt", "setup.py", "tools/install_env.py"):
        with open(copy / file, "a") as opened:
            opened.write("\n")
        seen.add(env.fingerprint())
    assert len(seen) == 5
    (copy / "LICENSE").unlink()
    assert env.fingerprint() in seen


def test_uninstalling_a_package_makes_the_environment_outdated(env, monkeypatch):
    env.stamp.write_text(env.fingerprint())
    monkeypatch.setattr(env, "absent", lambda modules: set(modules) & {"detectron2"})
    assert not env.is_current()


def test_absent_looks_into_the_environment(env):
    assert env.absent(["torch", "no_such_module", "detectron2"]) == ["no_such_module"]


def test_lock_waits_for_the_other_installation(env, capsys):
    locked = threading.Event()

    def hold():
        with env.lock():
            locked.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    locked.wait()
    start = time.monotonic()
    with env.lock():
        assert time.monotonic() - start > 0.3
    other.join()
    assert "another installation is at work" in capsys.readouterr().out


# Python versions and requirement files


@pytest.mark.parametrize("minor", MINORS)
def test_supported_python_is_accepted(minor):
    install_env.check_python((3, minor, 0))


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0), (4, 0, 0)])
def test_other_python_is_refused_with_the_command_to_run(version):
    with pytest.raises(install_env.InstallError, match=r"3\.10 to 3\.13(.|\n)*PYTHON="):
        install_env.check_python(version)


def test_an_old_python_gets_a_message_and_no_traceback():
    script = str(ROOT / "tools" / "install_env.py")
    ast.parse(Path(script).read_text(), feature_version=(3, 6))
    code = f"""
import runpy, sys
sys.version_info = (3, 8, 10, "final", 0)
sys.argv = ["install_env.py"]
runpy.run_path({script!r}, run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "is Python 3.8" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("minor", MINORS)
def test_tested_versions_satisfy_the_requirements(minor):
    file = ROOT / "requirements" / f"constraints-py3{minor}.txt"
    pins = dict(line.split("==") for line in install_env.requirement_lines(file))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for name in REQUIREMENT_FILES:
        for line in install_env.requirement_lines(ROOT / "requirements" / f"{name}.txt"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_detectron2_is_pinned_by_hash():
    (line,) = install_env.requirement_lines(ROOT / "requirements" / "detectron2.txt")
    assert re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line)


# What gets installed


def test_environment_of_our_own_gets_the_tested_set(env, pip_calls):
    env.base.write_text("[]")
    env.owned.touch()
    install_env.install_packages(env)
    (call,) = pip_calls
    constraints = Path(call[call.index("-c") + 1])
    assert constraints.name == f"constraints-py3{sys.version_info[1]}.txt"
    assert call.count("-r") == len(REQUIREMENT_FILES)


def test_environment_of_the_user_gets_only_what_is_missing(env, pip_calls, monkeypatch):
    monkeypatch.setattr(env, "absent", lambda modules: ["cv2", "tabulate"])
    install_env.install_packages(env)
    (call,) = pip_calls
    assert call[0] == "install" and call[-2:] == ("opencv-python-headless", "tabulate")
    pins = Path(call[call.index("-c") + 1]).read_text().splitlines()
    assert f"torch=={importlib.metadata.version('torch')}" in pins


def test_environment_of_the_user_without_torch_gets_the_tested_one(env, pip_calls, monkeypatch):
    monkeypatch.setattr(env, "absent", lambda modules: ["torch"])
    monkeypatch.setattr(install_env, "installed_versions", lambda env: {"numpy": "1.0"})
    install_env.install_packages(env)
    pins = Path(pip_calls[0][2]).read_text().splitlines()
    assert "numpy==1.0" in pins
    assert [line for line in pins if line.startswith(("torch==", "torchvision=="))]


def test_complete_environment_needs_no_pip(env, pip_calls, monkeypatch):
    monkeypatch.setattr(env, "absent", lambda modules: [])
    install_env.install_packages(env)
    install_env.install_detectron2(env)
    assert pip_calls == []


def test_half_installed_packages_are_forgotten(tmp_path):
    for name, files in {"whole": ("METADATA", "RECORD"), "half": ("METADATA",)}.items():
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        for file in files:
            (tmp_path / f"{name}-1.0.dist-info" / file).touch()
    install_env.remove_half_installed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole-1.0.dist-info"]


def test_detectron2_is_unpacked_without_its_stray_files(tmp_path):
    names = ["detectron2/__init__.py", "detectron2/_C.cpython-310-x86_64-linux-gnu.so"]
    names += ["tools/__init__.py", "sal_detectron2-0.7.2.dist-info/RECORD"]
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name in names:
            is_record = name.endswith("RECORD")
            archive.writestr(name, "".join(f"{n},,\n" for n in names) if is_record else "")
    target = install_env.unpack_detectron2(tmp_path / "x.whl", tmp_path / "out")
    expected = [names[0], names[-1]]
    found = [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()]
    assert sorted(found) == sorted(expected)
    (record,) = target.glob("*/RECORD")
    assert record.read_text().splitlines() == [f"{name},," for name in expected]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("WARNING: Retrying ... NewConnectionError(...)\nERROR: No matching dist", "be reached"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for torch==2.15.0", "have torch==2.15.0 for this"),
        ("/env/bin/python: No module named pip", "/env/bin/python -m ensurepip"),
        ("line\n" * 99 + "an unknown failure", "an unknown failure"),
    ],
)
def test_failure_of_pip_is_explained(output, message):
    text = install_env.explain(output)
    assert message in text and len(text.splitlines()) <= 15


def test_failing_command_names_the_log(env):
    with pytest.raises(install_env.InstallError, match=r"oops(.|\n)*exit code 3(.|\n)*install\.log"):
        install_env.run([sys.executable, "-c", "print('oops'); raise SystemExit(3)"], env)
    assert "oops" in env.log.read_text()


@pytest.mark.slow
def test_environment_over_this_one(checkout, tmp_path):
    """The whole script: the running Python has a detectron2, so nothing needs to be downloaded."""
    script = [sys.executable, checkout / "tools" / "install_env.py", "--venv", tmp_path / "env"]
    settings = {**os.environ, "PIP_NO_INDEX": "1", "PYTHONPATH": ""}

    def call(*command):
        start = time.monotonic()
        result = subprocess.run(
            [str(part) for part in command],
            **{"cwd": tmp_path, "env": settings, "capture_output": True, "text": True},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout, time.monotonic() - start

    output, _ = call(*script)
    assert "using it and its packages as they are" in output
    assert "the environment is ready" in output

    output, seconds = call(*script)
    assert output.startswith("environment ready") and len(output.splitlines()) == 1
    assert seconds < 5

    code = "import sparse_detr, sparse_detr.configs, detectron2, sys; "
    code += "print(sparse_detr.__file__, sparse_detr.configs.__path__[0], detectron2.__file__)"
    output, _ = call(tmp_path / "env" / "bin" / "python", "-W", "ignore", "-c", code)
    package, configs, detectron2 = output.split()
    assert package == str(checkout / "projects" / "sparse_detr" / "__init__.py")
    assert configs == str(checkout / "configs")
    assert detectron2 == importlib.util.find_spec("detectron2").origin


# The report


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


# Packaging


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


def test_ci_runs_make_test_and_make_test_installs_first():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    dry = subprocess.run(
        ["make", "-n", "test"], cwd=ROOT, env=settings, capture_output=True, text=True, check=True
    )
    assert re.search(r"install_env\.py(.|\n)*-m pytest", dry.stdout)
