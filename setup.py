"""Package metadata. Nothing heavy is imported: the op is compiled at its first use, not here."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in read(f"requirements/{name}.txt").splitlines())
    return [line for line in lines if line]


def version() -> str:
    return re.search(r'^__version__ = "(.+)"$', read("projects/sparse_detr/__init__.py"), re.M)[1]


setup(
    name="sparse-detr",
    version=version(),
    description="Efficient DETR detectors for detectron2: Sparse DETR, Focus-DETR, Lite DETR",
    long_description=read("README.md") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages("projects", include=["sparse_detr", "sparse_detr.*"]),
        "sparse_detr.kernels",
        "sparse_detr.configs",
    ],
    # kernels/ and configs/ live at the top of the checkout but are installed inside the package:
    # a top-level `kernels` or `configs` would collide with other distributions.
    package_dir={
        "": "projects",
        "sparse_detr.kernels": "kernels",
        "sparse_detr.configs": "configs",
    },
    package_data={
        "sparse_detr.report": ["page.html"],
        "sparse_detr.kernels": ["csrc/**/*"],
        "sparse_detr.configs": ["**/*.py", "yacs/*.yaml", "published.json"],
    },
    # detectron2 itself is missing on purpose: it isn't on the package index under its own name and
    # an installed one, whatever its origin, must be left alone. `make install` takes care of it.
    install_requires=requirements("runtime"),
    extras_require={
        "detectron2": requirements("detectron2-runtime"),  # what it imports; not detectron2 itself
        "dev": requirements("dev"),
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "fast-eval": ["faster-coco-eval"],
        "int8": ["torchao"],
        "safetensors": ["safetensors"],
        "timm": ["timm>=1.0"],
        "vis": ["opencv-python-headless", "matplotlib", "jinja2"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["sparse-detr = sparse_detr.cli:main"]},
    zip_safe=False,
)
