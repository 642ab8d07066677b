"""Processes that start in milliseconds: forked by one that has imported torch and the operators.

For tests of what many processes do, or one in another environment; none has computed anything yet.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "sparse_detr.kernels", __name__])


def _run(code, arguments, environment, out, err):
    os.setsid()
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # of the environment before
    warnings.simplefilter("default")
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<call>", "exec"), {"__name__": "__main__"})


class Forked:
    """Like ``subprocess.Popen([python, "-c", code, *arguments], env=environment)``, with both outputs."""

    def __init__(self, code: str, arguments: list[str], environment: dict[str, str], folder: Path):
        self.files = [Path(tempfile.mkstemp(dir=folder, prefix="forked-")[1]) for _ in range(2)]
        call = (code, arguments, environment, *self.files)
        self.process = _context.Process(target=_run, args=call)
        path = os.pathsep.join(map(str, (ROOT, ROOT / "projects")))
        with mock.patch.dict(
            os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"
        ):  # the server, if it starts now
            self.process.start()

    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """The process and all that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def finish(self, timeout: float = 240) -> tuple[int, str, str]:
        """Exit status, output, error output."""
        self.process.join(timeout)
        assert not self.process.is_alive(), f"not done after {timeout} s"
        return self.process.exitcode, *(file.read_text() for file in self.files)
