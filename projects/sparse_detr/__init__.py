"""Efficient DETR detectors for detectron2: Deformable DETR, DINO, Sparse DETR, Focus-DETR, Lite DETR."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# `sparse_detr.kernels` and `sparse_detr.configs` live at the top of a checkout, and inside this
# package once it is installed from a wheel.
_root = _Path(__file__).resolve().parents[2]
if (_root / "setup.py").is_file() and (_root / "kernels" / "csrc").is_dir():
    __path__.append(str(_root))

# Imported at first use: `sparse_detr.kernels` alone needs neither detectron2 nor the models.
_PUBLIC = {
    "get_config": "config",
    "list_configs": "config",
    "load_config": "config",
    "build_model": "predictor",
    "Predictor": "predictor",
    "add_sparse_detr_config": "yacs",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
