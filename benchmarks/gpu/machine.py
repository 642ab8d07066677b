"""What there is: GPU, torch, compilers, packages. Written as JSON; fails where torch sees no GPU.

python benchmarks/gpu/machine.py FILE.json    (DRY=1 in the environment: no GPU is fine)
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import _checkout
import torch

from benchmarks.report import machine, write_json

PACKAGES = (
    "pytest",
    "numpy",
    "torchvision",
    "detectron2",
    "fvcore",
    "omegaconf",
    "pycocotools",
    "triton",
    "torch_ms_deform_attn",
)


def first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [x for x in (done.stdout or done.stderr).splitlines() if x.strip()]
    return lines[0].strip() if lines else None


def main() -> int:
    found = {
        **machine("cuda" if torch.cuda.is_available() else "cpu"),
        "nvcc": first_line("nvcc", "--version")
        and (
            subprocess.run(["nvcc", "--version"], capture_output=True, text=True)
            .stdout.strip()
            .splitlines()[-1]
        ),
        "compiler": first_line("c++", "--version"),
        "compute-sanitizer": shutil.which("compute-sanitizer"),
        "ncu": shutil.which("ncu"),
        "driver and clocks": first_line(
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ),
        "packages": {x: importlib.util.find_spec(x) is not None for x in PACKAGES},
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["compute capability"] = f"{gpu.major}.{gpu.minor}"
        found["multiprocessors"] = gpu.multi_processor_count
        found["L2 MB"] = round(getattr(gpu, "L2_cache_size", 0) / 2**20, 1)
        found["memory GB"] = round(gpu.total_memory / 2**30, 1)
    write_json(sys.argv[1], found)
    for key, value in found.items():
        print(f"{key}: {value}")
    if "gpu" not in found and not os.environ.get("DRY"):
        print("PyTorch sees no GPU (without one: benchmarks/gpu_check.sh --dry-run)")
        return 1
    print(f"{found.get('gpu', 'no GPU')}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    _checkout.run(main)
