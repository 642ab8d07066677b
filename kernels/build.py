"""Builds and loads the compiled operators, at the first call that needs them.

One library per device type, `csrc/cpu` and `csrc/cuda`, compiled by ninja through
`torch.utils.cpp_extension` into a cache folder whose name is a hash of all that the binary depends
on. The folder's lock is `flock`: the kernel releases it when a builder dies, so a killed build is
simply done again. A library is compiled in a scratch folder, loaded there, and only then renamed
into place: what lies under its final name works.

    python -m sparse_detr.kernels          build what this machine can use, ahead of time
    python -m sparse_detr.kernels --check  say what would be used, build nothing

Environment: `SPARSE_DETR_OPS` = auto (default) | reference | cpu | cuda: "reference" never builds,
"cpu" and "cuda" make a failed build of that one an error; `implementation` says the same for a block
of code. `SPARSE_DETR_CACHE`: the cache folder. `MAX_JOBS`, `CXX`, `CUDA_HOME` and
`TORCH_CUDA_ARCH_LIST` mean what they mean to torch.
"""

import contextlib
import fcntl
import functools
import getpass
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

MODES = ("auto", "reference", "cpu", "cuda")
SOURCES = Path(__file__).resolve().parent / "csrc"
LIBRARY = "sparse_detr_{}.so"
PROBE = "sparse_detr::ms_deform_attn"

# ISA flags follow torch's own choice of kernels, not -march=native: homes are shared by machines.
CPU_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
COMMON_FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CUDA_FLAGS = ["-O3", "--expt-relaxed-constexpr"]

_thread = threading.local()  # .mode: what `implementation` chose. torch.compile can trace this one.
_lock = threading.RLock()
_loaded: dict[str, Path] = {}
_failed: dict[str, str] = {}


class BuildError(RuntimeError):
    """The compiled operators cannot be built; says why and what to do."""


@dataclass(frozen=True)
class Status:
    """What serves calls on a device type.

    backend: "cpp-cpu" or "cuda" for compiled operators, "reference" for plain PyTorch, "not built" or
    "not loaded" (built earlier) before the first call. cache_dir: where the library lies or would lie.
    """

    backend: str
    reason: str
    cache_dir: str | None = None


def status(device_type: str | None = None, *, load: bool = False) -> Status:
    """What serves calls on "cpu" or "cuda" (default: the GPU if there is one).

    Args:
        load: build and load the operators now if that has not happened yet.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if load:
        load_operators(device_type)
    if mode() == "reference":
        return Status("reference", "plain PyTorch is asked for: SPARSE_DETR_OPS or implementation()")
    if device_type in _loaded:
        path = _loaded[device_type]
        backend = "cuda" if device_type == "cuda" else "cpp-cpu"
        return Status(backend, f"compiled library {path.name} is loaded", str(path.parent))
    if device_type in _failed:
        return Status("reference", _failed[device_type])
    try:
        plan = Plan.make(device_type)
    except BuildError as error:
        return Status("reference", str(error))
    if plan.library.is_file():
        return Status("not loaded", f"compiled operators for {device_type}: built earlier", str(plan.folder))
    note = f"compiled operators for {device_type}: will be built at the first call"
    return Status("not built", note, str(plan.folder))


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Within it, and in this thread only, calls are served as with `SPARSE_DETR_OPS=name`.

    A graph of torch.export or torch.compile keeps what was chosen while it was traced.

    Args:
        name: "auto", "reference" (plain PyTorch), "cpu" or "cuda" (a failed build is an error).

    Raises:
        ValueError: another name.
    """
    if name not in MODES:
        raise ValueError(f"implementation {name!r} is not one of {', '.join(MODES)}")
    before = getattr(_thread, "mode", None)
    _thread.mode = name
    try:
        yield
    finally:
        _thread.mode = before


def mode() -> str:
    """What `implementation` chose, else the value of `SPARSE_DETR_OPS`."""
    chosen = getattr(_thread, "mode", None)
    if chosen is not None:
        return chosen
    value = os.environ.get("SPARSE_DETR_OPS", "auto").strip().lower() or "auto"
    if value not in MODES:
        raise ValueError(f"SPARSE_DETR_OPS={value!r} is not one of {', '.join(MODES)}")
    return value


def is_unavailable(device_type: str) -> bool:
    """Whether calls on this device type are known to be served by plain PyTorch."""
    now = mode()
    return now == "reference" or (device_type in _failed and now != device_type)


def load_operators(device_type: str) -> bool:
    """Build (if needed) and load the operators for "cpu" or "cuda".

    Returns:
        Whether they are loaded; if not, one warning has said why.

    Raises:
        BuildError: `SPARSE_DETR_OPS` or `implementation` demands these operators and they cannot be built.
    """
    with _lock:
        if is_unavailable(device_type):
            return False
        if device_type in _loaded:
            return True
        try:
            _loaded[device_type] = _build_and_load(Plan.make(device_type))
        except BuildError as error:
            if mode() == device_type:
                raise
            _failed[device_type] = str(error)
            warnings.warn(
                f"deformable attention on {device_type} runs in plain PyTorch, which is many "
                f"times slower: {error} (SPARSE_DETR_OPS=reference silences this)",
                stacklevel=2,
            )
            return False
        return True


@dataclass(frozen=True)
class Plan:
    """Everything that determines a library, and where it goes."""

    device_type: str
    sources: tuple[Path, ...]
    cflags: tuple[str, ...]
    cuda_flags: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    folder: Path

    @property
    def library(self) -> Path:
        return self.folder / LIBRARY.format(self.device_type)

    @classmethod
    def make(cls, device_type: str) -> "Plan":
        """Look at this machine.

        Raises:
            BuildError: there is nothing for this device type, or a tool is missing.
        """
        if device_type not in ("cpu", "cuda"):
            raise BuildError(f"there are no compiled operators for {device_type} devices")
        folder = SOURCES / device_type
        sources = sorted(p for suffix in ("*.cpp", "*.cu") for p in folder.glob(suffix))
        if not sources:
            raise BuildError(f"the sources are missing from {folder}: reinstall the package")
        compiler = _compiler()
        capability = torch.backends.cpu.get_cpu_capability()
        cflags = [*COMMON_FLAGS, *CPU_FLAGS.get(capability, [])]
        cuda_flags: list[str] = []
        environment: dict[str, str] = {}
        if device_type == "cuda":
            cflags = ["-O3"]
            cuda_flags = CUDA_FLAGS
            environment = {
                "CUDA_HOME": _cuda_home(),
                "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or _gpu_archs(),
            }
        key = hashlib.sha256()
        for part in (
            torch.__version__,
            str(torch.version.cuda),
            sys.implementation.cache_tag,
            platform.machine(),
            _version_of(*compiler),
            *cflags,
            *cuda_flags,
            *(f"{k}={v}" for k, v in sorted(environment.items())),
        ):
            key.update(part.encode() + b"\0")
        for path in sorted([*folder.iterdir(), *SOURCES.glob("*.h")]):
            if path.suffix in (".cpp", ".cu", ".h", ".cuh"):
                key.update(path.name.encode() + b"\0" + path.read_bytes())
        name = f"{device_type}-torch{torch.__version__.split('+')[0]}-{key.hexdigest()[:16]}"
        return cls(
            device_type,
            tuple(sources),
            tuple(cflags),
            tuple(cuda_flags),
            tuple(environment.items()),
            cache_dir() / name,
        )


def cache_dir() -> Path:
    """The first of these that can be written: `SPARSE_DETR_CACHE`, `TORCH_EXTENSIONS_DIR`, the
    user's cache, a private folder for temporary files.

    Raises:
        BuildError: none can.
    """
    candidates = []
    if os.environ.get("SPARSE_DETR_CACHE"):
        candidates.append(Path(os.environ["SPARSE_DETR_CACHE"]))
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        candidates.append(Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "sparse_detr")
    with contextlib.suppress(RuntimeError):  # no home
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        candidates.append(Path(home) / "sparse_detr")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    private = Path(tempfile.gettempdir()) / f"sparse_detr-{user}"
    for folder in (*candidates, private):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if folder is private:  # others may have put it there, to have their code loaded
                info = folder.stat()
                if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    continue
        except OSError:
            continue
        return folder
    raise BuildError(
        "no folder for the compiled operators can be written (tried "
        f"{', '.join(map(str, (*candidates, private)))}): set SPARSE_DETR_CACHE to one that can"
    )


def _compiler() -> tuple[str, ...]:
    """The C++ compiler's command, which may begin with a wrapper: `ccache g++`."""
    command = tuple(shlex.split(os.environ.get("CXX", ""))) or ("c++",)
    if shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler ({command[0]} is not on the PATH): install g++, or set CXX")
    return command


@functools.cache
def _version_of(*command: str) -> str:
    """First line of `command --version`."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return (done.stdout or done.stderr).partition("\n")[0]


def _cuda_home() -> str:
    """The CUDA toolkit; a wrapper script on the PATH is not it."""
    found = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        found.append(str(Path(nvcc).resolve().parents[1]))
    for home in filter(None, found):
        if (Path(home) / "bin" / "nvcc").is_file() and (Path(home) / "include").is_dir():
            return home
    raise BuildError("no CUDA compiler (nvcc): install the CUDA toolkit, or set CUDA_HOME")


def _gpu_archs() -> str:
    """Compute capabilities of the visible GPUs, as torch writes them."""
    if not torch.cuda.is_available():
        raise BuildError("no GPU is visible: set TORCH_CUDA_ARCH_LIST (e.g. 8.0;9.0) to build anyway")
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def _build_and_load(plan: Plan) -> Path:
    """Load the library, building it first if it is not there.

    Raises:
        BuildError: it cannot be compiled or loaded.
    """
    try:
        if not plan.library.is_file():
            plan.folder.mkdir(parents=True, exist_ok=True)
            with _locked(plan.folder / "lock"):
                if not plan.library.is_file():  # another process may have been faster
                    _compile(plan)
        if not _has_kernels(plan.device_type):
            torch.ops.load_library(str(plan.library))
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(f"{_first_error(str(error))} (sources in {SOURCES})") from error
    if not _has_kernels(plan.device_type):
        raise BuildError(f"{plan.library} registers no operators for {plan.device_type}: delete it")
    return plan.library


def _compile(plan: Plan) -> None:
    for leftover in plan.folder.glob("build-*"):  # of builds that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    logger.warning("building deformable attention for %s, once, up to a minute ...", plan.device_type)
    start = time.monotonic()
    scratch = tempfile.mkdtemp(prefix="build-", dir=plan.folder)
    try:
        with _environment(plan) as cpp_extension:
            cpp_extension.load(
                name=plan.library.stem,
                sources=list(map(str, plan.sources)),
                extra_cflags=list(plan.cflags),
                extra_cuda_cflags=list(plan.cuda_flags),
                extra_ldflags=["-fopenmp"],
                extra_include_paths=[str(plan.sources[0].parent)],
                build_directory=scratch,
                is_python_module=False,
                verbose=False,
                with_cuda=plan.device_type == "cuda",
            )
        os.replace(Path(scratch) / plan.library.name, plan.library)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.warning("built in %.0f s: %s", time.monotonic() - start, plan.library)


@contextlib.contextmanager
def _environment(plan: Plan) -> Iterator[ModuleType]:
    """torch's build module, with what it needs from the environment for this plan."""
    # It warns at import about a machine with nvcc and without a GPU, which is none of its business.
    torch_logger = logging.getLogger("torch.utils.cpp_extension")
    level = torch_logger.level
    torch_logger.setLevel(logging.ERROR)
    try:
        from torch.utils import cpp_extension
    finally:
        torch_logger.setLevel(level)

    changes = dict(plan.environment)
    try:
        import ninja  # a program of the environment, which may not be on the PATH

        changes["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")
    except ImportError:
        pass
    changes.setdefault("MAX_JOBS", os.environ.get("MAX_JOBS", str(min(4, os.cpu_count() or 1))))
    before = {name: os.environ.get(name) for name in changes}
    cuda_home = cpp_extension.CUDA_HOME
    os.environ.update(changes)
    cpp_extension.CUDA_HOME = changes.get("CUDA_HOME", cuda_home)  # read when it was imported
    try:
        yield cpp_extension
    finally:
        cpp_extension.CUDA_HOME = cuda_home
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process; says so if it has to wait."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("waiting for another process that builds deformable attention ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _has_kernels(device_type: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(PROBE, device_type.upper())


def _first_error(text: str) -> str:
    """The line of a compiler's output that tells most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for mark in ("error:", "cannot", "not found", "No "):
        for line in lines:
            if mark in line and "-o " not in line:
                return line
    return lines[-1] if lines else "the compiler failed without a message"
