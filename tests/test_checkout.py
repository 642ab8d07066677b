"""What can be imported from a checkout: the package, with `kernels` and `configs` from the root."""

import importlib
import os
import pickle
import subprocess
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest

import sparse_detr
from sparse_detr import kernels
from sparse_detr.kernels.build import Status

ROOT = Path(__file__).resolve().parents[1]
# Everything at the root that could be taken for a module, but the two that belong to the package.
OTHERS = sorted(
    {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and p.name.isidentifier())}
    - {"kernels", "configs"}
)


def test_kernels_and_configs_come_from_the_root():
    assert Path(kernels.__file__).parent == ROOT / "kernels"
    files = resources.files("sparse_detr.configs")
    assert (files / "quick" / "sparse_detr_shapes.py").is_file() and Path(str(files)) == ROOT / "configs"


def test_nothing_else_of_the_root_is_in_the_package():
    assert {"tests", "tools", "projects", "docs", "setup", "train_net"} <= set(OTHERS)
    assert [name for name in OTHERS if find_spec(f"sparse_detr.{name}")] == []
    with pytest.raises(ModuleNotFoundError, match="No module named 'sparse_detr.tests'"):
        importlib.import_module("sparse_detr.tests")


def test_a_reload_changes_nothing():
    importlib.reload(sparse_detr)
    assert find_spec("sparse_detr.kernels") and not find_spec("sparse_detr.tools")


# Under the name that detectron2's projects have, and as a spawned worker meets an object of the
# kernels: by the names of its modules, before anything is imported. `python -m` finds them, too.
FRESH_PROCESS = """
import importlib.util, pickle, runpy, sys
print(pickle.loads(bytes.fromhex(sys.argv[1])).reason)
import projects.sparse_detr as package
print(importlib.util.find_spec("projects.sparse_detr.configs").origin)
print(sys.modules["projects.sparse_detr.kernels"].__file__)
print(importlib.util.find_spec("projects.sparse_detr.tests"))
sys.argv[1:] = ["--help"]
runpy.run_module("projects.sparse_detr.kernels", run_name="__main__")
"""


def test_it_works_under_the_name_that_detectron2s_projects_have():
    status = pickle.dumps(Status("reference", "why"), protocol=0)
    sent = status.replace(b"csparse_detr.", b"cprojects.sparse_detr.").hex()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH_PROCESS, sent],
        cwd=ROOT.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reason, configs, op, tests, usage = done.stdout.split("\n", 4)
    assert (reason, tests) == ("why", "None") and usage.startswith("usage")
    assert (Path(op).parent, Path(configs).parent) == (ROOT / "kernels", ROOT / "configs")
