"""Setting up the environment. No network is used."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "tools")
    import install_env

MINORS = (10, 11, 12, 13)


@pytest.fixture
def pip_calls(monkeypatch, tmp_path):
    """Arguments of the calls of pip that would have been made; packages would go to tmp_path."""
    calls = []
    monkeypatch.setattr(install_env, "pip", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(install_env.sysconfig, "get_path", lambda name: str(tmp_path))
    return calls


def lines(file):
    return install_env.lines_by_name((ROOT / "requirements" / file).read_text())


# Python versions and requirement files


@pytest.mark.parametrize("minor", MINORS)
def test_tested_versions_satisfy_the_requirements(minor):
    pins = dict(line.split("==") for line in lines(install_env.tested_versions((3, minor)).name).values())
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for file in install_env.FILES:
        for line in lines(file.name).values():
            requirement = Requirement(line)
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_detectron2_is_pinned_by_hash():
    (line,) = lines("detectron2.txt").values()
    assert re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line)


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0), (4, 0, 0)])
def test_other_python_is_refused_with_the_command_to_run(version):
    with pytest.raises(SystemExit, match=r"3\.10 to 3\.13 is needed(.|\n)*PYTHON="):
        install_env.tested_versions(version)


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


# What gets installed


def test_environment_of_our_own_gets_the_tested_set(pip_calls, tmp_path):
    """And what pip was killed over is no package."""
    for name, files in {"whole": ("METADATA", "RECORD"), "half": ("METADATA",)}.items():
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        for file in files:
            (tmp_path / f"{name}-1.0.dist-info" / file).touch()
    install_env.install_tested()
    assert [path.name for path in tmp_path.iterdir()] == ["whole-1.0.dist-info"]
    (call,) = pip_calls
    assert call[call.index("-c") + 1].name == f"constraints-py3{sys.version_info[1]}.txt"
    assert call.count("-r") == 3


def test_environment_of_the_user_gets_only_what_is_missing(pip_calls, tmp_path, monkeypatch):
    monkeypatch.setattr(install_env, "absent", lambda modules: ["cv2", "tabulate"])
    install_env.install_missing(tmp_path / "pins")
    (call,) = pip_calls
    assert call[0] == "install" and call[-2:] == ("opencv-python-headless", "tabulate")
    pins = install_env.lines_by_name((tmp_path / "pins").read_text())
    for name in ("torch", "numpy"):
        assert pins[name] == f"{name}=={importlib.metadata.version(name)}"
    assert call[call.index("-c") + 1] == tmp_path / "pins"


def test_environment_of_the_user_without_torch_gets_the_tested_one(pip_calls, tmp_path, monkeypatch):
    monkeypatch.setattr(install_env, "absent", lambda modules: ["torch"])
    monkeypatch.setattr(install_env.subprocess, "check_output", lambda *_, **__: "numpy==1.0\nMy_Own==2\n")
    install_env.install_missing(tmp_path / "pins")
    pins = install_env.lines_by_name((tmp_path / "pins").read_text())
    assert pins["numpy"] == "numpy==1.0" and pins["my-own"] == "My_Own==2"
    assert pins["torch"] == lines(install_env.tested_versions().name)["torch"]


def test_complete_environment_needs_no_pip(pip_calls, tmp_path, monkeypatch):
    monkeypatch.setattr(install_env, "absent", lambda modules: [])
    install_env.install_missing(tmp_path / "pins")
    assert pip_calls == [] and not (tmp_path / "pins").exists()


def test_absent_is_what_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "left_over").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert install_env.absent(["torch", "no_such_module", "left_over"]) == ["no_such_module", "left_over"]


def test_detectron2_comes_without_its_stray_files(tmp_path, monkeypatch):
    work, site = tmp_path / "work", tmp_path / "site"
    info = "sal_detectron2-0.7.2.dist-info/RECORD"
    names = ["detectron2/__init__.py", "detectron2/_C.cpython-310-x86_64-linux-gnu.so", "tools/__init__.py"]

    def pip(*arguments):
        assert arguments[arguments.index("--target") + 1] == work and "--require-hashes" in arguments
        for name in (*names, info):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text("".join(f"{n},,\n" for n in names) if name == info else "")

    (site / "tools").mkdir(parents=True)
    (site / "tools" / "of_the_user.py").touch()
    monkeypatch.setattr(install_env, "pip", pip)
    monkeypatch.setattr(install_env.sysconfig, "get_path", lambda name: str(site))
    install_env.install_detectron2(work)
    found = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert found == {names[0], info, "tools/of_the_user.py"} and not work.exists()
    assert "tools/" not in (site / info).read_text()


# The whole script


def test_a_failing_program_ends_in_one_message(capfd):
    with pytest.raises(SystemExit, match=r"exit code 3 from(.|\n)*docs/install.md(.|\n)*make install again"):
        install_env.run(sys.executable, "-c", "print('oops'); raise SystemExit(3)")
    assert capfd.readouterr().out == "oops\n"


def test_no_environment_is_made_over_something_else(tmp_path):
    base = tmp_path / ".sparse_detr" / "base.json"
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="neither empty nor a Python environment"):
        install_env.create(tmp_path, base)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/nonexistent/python")
    with pytest.raises(SystemExit, match=r"is gone\.\nRun: rm -rf"):
        install_env.create(tmp_path, base)


@pytest.mark.slow
def test_environment_over_this_one(tmp_path):
    """The running Python has a detectron2 and all packages, so nothing needs to be downloaded."""
    checkout, env = tmp_path / "checkout", tmp_path / "env"
    for name in ("projects", "kernels", "configs", "requirements", "tools"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout)
    settings = {**os.environ, "PIP_NO_INDEX": "1", "PYTHONPATH": ""}

    def call(*command):
        start = time.monotonic()
        command = [str(part) for part in command]
        result = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout, time.monotonic() - start

    script = [checkout / "tools" / "install_env.py", "--venv", env]
    output, _ = call(sys.executable, *script)
    assert "using it and its packages as they are" in output and "the environment is ready" in output

    output, seconds = call(sys.executable, *script)
    assert output == f"environment ready: {env}\n" and seconds < 5

    code = "import json, sparse_detr, sparse_detr.configs as c, torch, detectron2; "
    code += "print(json.dumps([sparse_detr.__file__, c.__path__[0], torch.__file__, detectron2.__file__]))"
    package, configs, *others = json.loads(call(env / "bin" / "python", "-W", "ignore", "-c", code)[0])
    assert package == str(checkout / "projects" / "sparse_detr" / "__init__.py")
    assert configs == str(checkout / "configs")
    assert others == [importlib.util.find_spec(name).origin for name in ("torch", "detectron2")]

    with open(checkout / "requirements" / "runtime.txt", "a") as file:
        file.write("\n# another state of the requirements\n")
    assert "all packages are there already" in call(env / "bin" / "python", *script)[0]


def test_ci_lints_then_tests_and_both_install_first():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"make lint(.|\n)*make test", script.read_text())
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for target, expected in (("test", r"-m pytest"), ("lint", r"ruff(.|\n)*clang-format(.|\n)*mypy")):
        dry = subprocess.run(
            ["make", "-n", target], cwd=ROOT, env=settings, capture_output=True, text=True, check=True
        )
        assert re.search(rf"install_env\.py(.|\n)*{expected}", dry.stdout)
