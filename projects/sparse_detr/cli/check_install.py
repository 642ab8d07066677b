"""Show what is installed, which implementation of the op is in use, and what is missing.

    sparse-detr check-install [--json]

Exits with 1 if something required is missing or doesn't work; each problem comes with the command
that fixes it. Causes and fixes in words: docs/install.md.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from . import flags

ROOT = Path(__file__).resolve().parents[3]  # of a checkout
REQUIRED = ("runtime", "detectron2-runtime")  # its requirements/*.txt
SHOWN = ("torch", "torchvision", "numpy", "pycocotools", "fvcore", "ninja")
IMPORT_NAMES = {"hydra-core": "hydra", "opencv-python-headless": "cv2", "Pillow": "PIL"}
SNAPSHOT = "sal-detectron2"


@dataclasses.dataclass
class Report:
    """Rows of (name, version or state, remark), and what is wrong with them."""

    rows: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    op: dict[str, dict] = dataclasses.field(default_factory=dict)  # by device type
    problems: list[dict] = dataclasses.field(default_factory=list)

    def add(self, name: str, version: str, remark: str = "") -> None:
        self.rows.append((name, version, remark))

    def problem(self, what: str, fix: str, *, required: bool = True) -> None:
        self.problems.append({"what": what, "fix": fix, "required": required})

    @property
    def ok(self) -> bool:
        return not any(problem["required"] for problem in self.problems)


def first_line(*command: str | Path) -> str | None:
    """First line that a program prints, or None if it isn't there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.strip().splitlines()
    return lines[0] if result.returncode == 0 and lines else None


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip_install(*requirements: str) -> str:
    return " ".join([sys.executable, "-m pip install", *(f"'{name}'" for name in requirements)])


def is_importable(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def error_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def check_requirements(report: Report) -> None:
    """Packages that must be there, in a version that is new (or old) enough."""
    for requirement in requirements():
        name = re.split(r"[^\w.-]", requirement)[0]
        module = IMPORT_NAMES.get(name, name.replace("-", "_"))
        version = installed_version(name)
        if name in SHOWN:
            report.add(name, version or "missing")
        if not is_importable(module):
            report.problem(f"{name} is missing", pip_install(requirement))
        elif name == "setuptools":  # its version matters to detectron2.model_zoo alone
            if not is_importable("pkg_resources"):
                what = f"setuptools {version} breaks detectron2.model_zoo, which isn't used here"
                report.problem(what, pip_install(requirement), required=False)
        elif version and not is_satisfied(requirement, version):
            what = f"{name} {version} is installed, {requirement} is needed"
            report.problem(what, pip_install(requirement))


def requirements() -> list[str]:
    """What this package and detectron2 import: as the checkout says it, or the installed wheel."""
    folder = ROOT / "requirements"
    if folder.is_dir():
        lines = [line for name in REQUIRED for line in (folder / f"{name}.txt").read_text().splitlines()]
        return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    return [
        line.partition(";")[0].strip()
        for line in importlib.metadata.requires("sparse-detr") or ()
        if "extra ==" not in line or re.search(r"extra == .detectron2.", line)
    ]


def is_satisfied(requirement: str, version: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:  # reported as missing itself
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def check_detectron2(report: Report) -> None:
    if not is_importable("detectron2"):
        report.add("detectron2", "missing")
        report.problem(
            "detectron2 is missing",
            "make install   (or your own: pip install --no-build-isolation "
            "git+https://github.com/facebookresearch/detectron2)",
        )
        return
    try:
        import detectron2

        for part in ("checkpoint", "data", "engine", "evaluation", "modeling"):
            importlib.import_module(f"detectron2.{part}")
    except Exception as error:
        report.add("detectron2", "broken", error_line(error))
        report.problem(
            f"detectron2 doesn't import: {error_line(error)}",
            "look the message up in docs/install.md",
        )
        return
    folder = Path(detectron2.__file__).parent
    compiled = "with" if is_importable("detectron2._C") else "without"
    remark = f"{detectron2_origin(folder)}; {compiled} compiled _C; {folder}"
    report.add("detectron2", detectron2.__version__, remark)


def detectron2_origin(folder: Path) -> str:
    """Which state of detectron2 this is, as far as it can be told."""
    if installed_version(SNAPSHOT):
        return f"{SNAPSHOT} {installed_version(SNAPSHOT)} = upstream a59f0563 of April 2024"
    if (folder.parent / ".git").exists():
        commit = first_line("git", "-C", folder.parent, "describe", "--always", "--dirty")
        return f"git checkout at {commit or 'an unknown commit'}"
    try:
        origin = importlib.metadata.distribution("detectron2").read_text("direct_url.json") or ""
        return f"git commit {json.loads(origin)['vcs_info']['commit_id'][:8]}"
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        pass
    newer = (folder / "utils" / "torch_version_utils.py").exists()
    return f"built from source, {'newer' if newer else 'not newer'} than April 2024"


def check_build_tools(report: Report) -> None:
    """What builds the op; ``check_package`` tells whether that works."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]  # what torch's cpp_extension calls
    version = first_line(*compiler, "--version")
    report.add("compiler", version or "missing", shutil.which(compiler[0]) or "")
    nvcc = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    release = re.search(r"release ([\d.]+)", run_output(nvcc, "--version")) if nvcc else None
    report.add("nvcc", release[1] if release else "missing", nvcc or "only needed with a GPU")


def run_output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def check_gpu(report: Report) -> None:
    try:
        import torch
    except Exception as error:
        report.problem(f"torch doesn't import: {error_line(error)}", pip_install("torch>=2.6"))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the driver; said below
        available = torch.cuda.is_available()
    built_for = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else None
    if available:
        devices = range(torch.cuda.device_count())
        names = sorted({torch.cuda.get_device_name(index) for index in devices})
        report.add("GPU", f"{len(devices)} x {', '.join(names)}", built_for or "")
    elif built_for and first_line("nvidia-smi", "-L"):
        report.add("GPU", "not usable", built_for)
        report.problem(
            f"there is a GPU, but {built_for} and can't use it: the driver is probably too old",
            "update the NVIDIA driver, or install a torch built for an older CUDA",
            required=False,
        )
    else:
        report.add("GPU", "none", built_for or "torch is built without CUDA")


def check_package(report: Report) -> None:
    """sparse_detr itself and its deformable-attention op, which is compiled if it isn't yet."""
    where = "installed" if installed_version("sparse-detr") else "not installed, used from the checkout"
    try:
        package = importlib.import_module("sparse_detr")
        folder = os.path.dirname(package.__file__ or "")
        report.rows.insert(0, ("sparse_detr", package.__version__, f"{where}; {folder}"))
        kernels = importlib.import_module("sparse_detr.kernels")
        import torch

        for device_type in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            status = kernels.status(device_type, load=True)
            report.op[device_type] = dataclasses.asdict(status)
            if status.backend == "reference":
                report.problem(
                    f"the op on {device_type} runs in plain PyTorch, which is slower: {status.reason}",
                    "look the reason up in docs/install.md, The compiled op",
                    required=False,
                )
    except Exception as error:
        report.problem(
            f"sparse_detr or its op can't be used: {error_line(error)}",
            "look the message up in docs/install.md",
        )


def collect() -> Report:
    report = Report()
    report.add("python", platform.python_version(), sys.executable)
    check_requirements(report)
    check_detectron2(report)
    check_build_tools(report)
    check_gpu(report)
    check_package(report)
    return report


def as_text(report: Report) -> str:
    rows = list(report.rows)
    for device_type, status in report.op.items():
        rows.append((f"op on {device_type}", status["backend"], status["reason"]))
        if status["cache_dir"]:
            rows.append(("", "", f"compiled in {status['cache_dir']}"))
    lines = [f"{name:12} {version:20} {remark}".rstrip() for name, version, remark in rows]
    for problem in report.problems:
        kind = "MISSING" if problem["required"] else "note"
        lines += ["", f"{kind}: {problem['what']}", f"  fix: {problem['fix']}"]
    verdict = "Everything required is there." if report.ok else "Not usable yet: see MISSING above."
    return "\n".join([*lines, "", verdict])


def main() -> int:
    parser = flags.parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    report = collect()
    if arguments.json:
        print(json.dumps({"ok": report.ok, **dataclasses.asdict(report)}, indent=2))
    else:
        print(as_text(report))
    return 0 if report.ok else 1
