"""The CUDA extension of Deformable DETR's repository, to measure against.

python benchmarks/gpu/published.py pack OPS FOLDER     its sources, models/ops, for a torch of today
python benchmarks/gpu/published.py build FOLDER SITE    SITE/MultiScaleDeformableAttention.so

Names that torch has retired are replaced; what is computed stays as it is.
"""

import re
import shutil
import sys
from pathlib import Path

NAME = "MultiScaleDeformableAttention"
RETIRED = [
    (r"#include <THC/THCAtomics\.cuh>", "#include <ATen/cuda/Atomic.cuh>"),
    (r"#include <ATen/cuda/CUDAContext\.h>", "#include <c10/cuda/CUDAStream.h>"),  # needs less of a toolkit
    (r"at::cuda::getCurrentCUDAStream", "c10::cuda::getCurrentCUDAStream"),
    (r"\.type\(\)\.is_cuda\(\)", ".is_cuda()"),
    (r"(AT_DISPATCH_FLOATING_TYPES\(value)\.type\(\)", r"\1.scalar_type()"),
    (r"\.data<", ".data_ptr<"),
    (r"AT_ASSERTM\(", "TORCH_CHECK("),
    (r"AT_ERROR\(", "TORCH_CHECK(false, "),
]


def pack(ops: Path, folder: Path) -> None:
    if not (ops / "src" / "vision.cpp").exists():
        raise SystemExit(f"{ops}: expected models/ops of Deformable DETR's repository, with src/vision.cpp")
    shutil.copytree(ops / "src", folder)
    for path in folder.rglob("*.*"):
        text = path.read_text()
        for pattern, replacement in RETIRED:
            text = re.sub(pattern, replacement, text)
        path.write_text(text)


def build(folder: Path, site: Path) -> None:
    from torch.utils.cpp_extension import load

    sources = [path for kind in ("*.cpp", "*/*.cpp", "*/*.cu") for path in sorted(folder.glob(kind))]
    target = site / f"build_{NAME}"
    target.mkdir(parents=True)
    load(
        NAME,
        list(map(str, sources)),
        extra_include_paths=[str(folder)],
        extra_cflags=["-DWITH_CUDA"],
        extra_cuda_cflags=["-DWITH_CUDA"],
        build_directory=str(target),
        with_cuda=True,
        is_python_module=False,
    )
    (target / f"{NAME}.so").rename(site / f"{NAME}.so")
    print(f"built {NAME} from its sources")


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    {"pack": pack, "build": build}[command](*map(Path, folders))
