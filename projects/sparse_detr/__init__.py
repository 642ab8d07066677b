"""Efficient DETR detectors for detectron2: Deformable DETR, DINO, Sparse DETR, Focus-DETR, Lite DETR."""

import sys as _sys
from importlib.machinery import PathFinder as _PathFinder
from pathlib import Path as _Path

__version__ = "0.1.0"


class _CheckoutFinder:
    """Finds ``sparse_detr.kernels`` and ``sparse_detr.configs`` at the top of a checkout, nothing else there.

    Once installed from a wheel they lie inside this package, where Python looks by itself. First of
    all finders: another checkout may be installed in editable mode, with a finder of its own.
    """

    names = (f"{__name__}.kernels", f"{__name__}.configs")  # also as `projects.sparse_detr`
    root = _Path(__file__).resolve().parents[2]

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return _PathFinder.find_spec(fullname, [str(cls.root)], target) if fullname in cls.names else None


if (_CheckoutFinder.root / "setup.py").is_file() and (_CheckoutFinder.root / "kernels" / "csrc").is_dir():
    _sys.meta_path.insert(0, _CheckoutFinder)

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
