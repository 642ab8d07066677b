"""Settings of the test run. That `sparse_detr` is this checkout's is set in pyproject.toml."""

import fcntl
import os
import random
import shutil

# Workers of pytest-xdist share the cores; before torch is imported, and for what the tests start. Where
# more threads are asked for, one that waits must not keep a core from the others.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, whichever tests run before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, make)``: the folder that ``make(folder)`` has filled, once per test run.

    Whichever worker comes first makes it, the others wait and read. ``name`` is unique in the suite.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name, make):
        folder, done = root / f"once-{name}", root / f"once-{name}.done"
        with open(root / f"once-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that has failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get
