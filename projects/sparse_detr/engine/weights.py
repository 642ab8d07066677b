"""Reading weight files, whoever wrote them, without running code from them.

A pickle may call any function it can name. ``.pth`` files are read by torch's ``weights_only``
loader; detectron2's ``.pkl`` by an unpickler that knows how to rebuild numpy arrays and nothing
else; ``.npz`` and ``.safetensors`` hold no code. A ``.zip`` is read for the one ``.pth`` in it.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import UserError

# In many published files; also for detectron2's checkpointer, which reads files without this module.
torch.serialization.add_safe_globals([argparse.Namespace])

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


# What is found under the name of a weights file when its download went wrong, by its first bytes.
_NOT_WEIGHTS = {
    b"<": "it is a web page (HTML), not the file behind it",
    b"version https://git-lfs": "it is a Git LFS pointer, not the file that it stands for (git lfs pull)",
}


class WeightsError(UserError):
    """A weights file cannot be read, or holds what must not or cannot be loaded."""


def _explained(read: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """``read``, whose every failure is a ``WeightsError`` with path, size, cause and remedy."""

    @functools.wraps(read)
    def explained(path: str) -> dict[str, Any]:
        size = os.path.getsize(path)
        try:
            with open(path, "rb") as file:
                start = file.read(100).lstrip()
            reason = next((why for sign, why in _NOT_WEIGHTS.items() if start.startswith(sign)), None)
            if not reason:
                return read(path)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # torch, pickle, numpy and zipfile each have their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if not size:
            reason = "the file is empty"
        raise WeightsError(
            f"cannot read the weights {path} ({size:,} bytes): {reason}. If it is cut or no weights file, "
            "fetch it elsewhere and pass train.init_checkpoint=/path/to/it"
        )

    return explained


class _Refused(pickle.UnpicklingError):
    pass


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAY_PARTS:
            return super().find_class(module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):  # bytes, in old pickle protocols
            return _encode
        raise _Refused(f"it asks for {module}.{name}")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


@_explained
def read_torch(path: str) -> dict[str, Any]:
    """A ``.pth`` file, its weights under "model". Many published files hold a Namespace: allowed.

    Raises:
        WeightsError: it cannot be read, holds more than tensors and plain values, or no dict.
    """
    with open(path, "rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # a zip file, or a pickle as before torch 1.6
            raise pickle.UnpicklingError("torch.save has not written it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"{path} holds more than tensors and plain values ({reason}): if you trust it, save "
            "its weights alone: torch.save(torch.load(path, weights_only=False)['model'], new_path)"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    if "model" not in content:
        content = {"model": content.get("state_dict", content)}
    return content


@_explained
def read_zip(path: str) -> dict[str, Any]:
    """The ``.pth`` file in a ``.zip``, as ``read_torch`` reads it. (torch's own files are zip files, too.)

    Raises:
        WeightsError: there is none, or more than one; or see ``read_torch``.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
        if any(name.endswith("/data.pkl") for name in names):
            return read_torch(path)
        inside = [name for name in names if name.endswith((".pth", ".pt"))]
        if len(inside) != 1:
            raise WeightsError(
                f"{path} holds {len(inside)} .pth files, expected one: unpack it and pass the file"
            )
        with tempfile.TemporaryDirectory() as folder:
            return read_torch(archive.extract(inside[0], folder))


@_explained
def read_pickle(path: str) -> dict[str, Any]:
    """A ``.pkl`` of detectron2 or Caffe2: numpy arrays under "model", "__author__" names its maker.

    Raises:
        WeightsError: it cannot be read, or holds more than numpy arrays and plain values; nothing of
            it was run.
    """
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except _Refused as error:
        raise WeightsError(
            f"{path} was not loaded: {error}. A pickle can run any code; detectron2's .pkl files "
            "hold numpy arrays and plain values only"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a dict of arrays")
    if "model" in content and "__author__" in content:
        return content
    arrays = content.get("blobs", content)  # Caffe2: detectors have blobs, ImageNet models have not
    arrays = {name: value for name, value in arrays.items() if not name.endswith("_momentum")}
    return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}


@_explained
def read_npz(path: str) -> dict[str, Any]:
    """Numpy arrays by name; float16 becomes float32.

    Raises:
        WeightsError: it cannot be read.
    """
    with np.load(path, allow_pickle=False) as arrays:
        return {
            "model": {
                name: torch.from_numpy(array.astype(np.float32) if array.dtype == np.float16 else array)
                for name, array in arrays.items()
            }
        }


@_explained
def read_safetensors(path: str) -> dict[str, Any]:
    """Tensors by name.

    Raises:
        WeightsError: the package safetensors is not installed, or cannot read the file.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise WeightsError(f"{path} needs a package: pip install safetensors") from error
    return {"model": load_file(path)}
