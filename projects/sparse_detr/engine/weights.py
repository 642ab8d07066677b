"""Reading weight files, whoever wrote them, without running code from them.

A pickle may call any function it can name. ``.pth`` files are read by torch's ``weights_only``
loader; detectron2's ``.pkl`` by an unpickler that knows how to rebuild numpy arrays and nothing
else; ``.npz`` and ``.safetensors`` hold no code.
"""

from __future__ import annotations

import argparse
import collections
import pickle
from typing import Any

import numpy as np
import torch

# What a pickled numpy array of any numpy version is rebuilt from.
_ARRAY_PARTS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAY_PARTS:
            return super().find_class(module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):  # bytes, in old pickle protocols
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


def read_torch(path: str) -> dict[str, Any]:
    """A ``.pth`` file, its weights under "model". Many published files hold a Namespace: allowed.

    Raises:
        pickle.UnpicklingError: it holds more than tensors and plain values, or is garbage.
        ValueError: it holds no dict.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise
        reason = str(error).strip().splitlines()[0]
        raise pickle.UnpicklingError(
            f"{path} holds more than tensors and plain values ({reason}): if you trust it, save "
            "its weights alone: torch.save(torch.load(path, weights_only=False)['model'], new_path)"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    if "model" not in content:
        content = {"model": content.get("state_dict", content)}
    return content


def read_pickle(path: str) -> dict[str, Any]:
    """A ``.pkl`` of detectron2 or Caffe2: numpy arrays under "model", "__author__" names its maker.

    Raises:
        ValueError: it holds more than numpy arrays and plain values; nothing of it was run.
    """
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not loaded: {error}. A pickle can run any code; detectron2's .pkl files "
            "hold numpy arrays and plain values only"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of arrays")
    if "model" in content and "__author__" in content:
        return content
    arrays = content.get("blobs", content)  # Caffe2: detectors have blobs, ImageNet models have not
    arrays = {name: value for name, value in arrays.items() if not name.endswith("_momentum")}
    return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}


def read_npz(path: str) -> dict[str, Any]:
    """Numpy arrays by name; float16 becomes float32."""
    with np.load(path, allow_pickle=False) as arrays:
        return {
            "model": {
                name: torch.from_numpy(array.astype(np.float32) if array.dtype == np.float16 else array)
                for name, array in arrays.items()
            }
        }


def read_safetensors(path: str) -> dict[str, Any]:
    """Tensors by name.

    Raises:
        ValueError: the package safetensors is not installed, or cannot read the file.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{path} needs a package: pip install safetensors") from error
    try:
        return {"model": load_file(path)}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
