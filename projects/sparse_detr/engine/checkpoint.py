"""Checkpoints: written atomically, found again after a crash, and loaded from several sources.

``train.init_checkpoint`` may be one of our own files, a detectron2 ``.pkl``, a published ``.pth``
of the methods that this package implements (converted by ``engine.convert``), or a ``.npz`` of
numpy arrays under detectron2's backbone names. Files are read with ``weights_only``: an untrusted
checkpoint cannot run code. (``.pkl`` is a pickle by nature: load only those you trust.)
"""

import argparse
import contextlib
import glob
import os
import pickle
import re
import zipfile
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer

from .convert import convert_state_dict, detect_family

# what torch raises for a file that ends early or is garbage
_UNREADABLE = (EOFError, OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile)


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer with atomic writes, fall-back on resume, and more file types.

    ``class_names``, once set, is stored in every file, for ``Predictor``.
    """

    class_names: list[str] | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<save_dir>/<name>.pth``, then names it in ``last_checkpoint``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()}, **kwargs)
        if self.class_names is not None:
            data["class_names"] = list(self.class_names)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with _replacing(path) as partial:
            torch.save(data, partial)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with (
            _replacing(os.path.join(self.save_dir, "last_checkpoint")) as partial,
            open(partial, "w") as file,
        ):
            file.write(last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(self._candidates())

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the newest readable checkpoint of the run if ``resume``, else ``path``'s weights.

        Raises:
            ValueError: ``resume``, and none of the checkpoints that are there can be read.
        """
        candidates = self._candidates() if resume else []
        if not candidates:
            return self.load(path, checkpointables=[])
        for candidate in candidates:
            try:
                _read(candidate)
            except _UNREADABLE as error:
                self.logger.error(
                    "cannot read %s (%s): trying the checkpoint before it", candidate, error
                )
                continue
            return self.load(candidate)
        raise ValueError(
            f"none of the checkpoints in {self.save_dir} can be read "
            f"({', '.join(map(os.path.basename, candidates))}): "
            "delete them, or start without --resume"
        )

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise ValueError(f"train.init_checkpoint: there is no file {os.path.abspath(path)}")
        return super().load(path, *args, **kwargs)

    def _candidates(self) -> list[str]:
        """Checkpoints to resume from: the tagged one, then the others from new to old."""
        files = glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth"))
        files = [f for f in files if re.fullmatch(r"model_(\d+|final)\.pth", os.path.basename(f))]
        files.sort(key=lambda f: (os.path.getmtime(f), f), reverse=True)
        tagged = self.get_checkpoint_file()
        if tagged and os.path.isfile(tagged):
            files = [tagged] + [f for f in files if f != tagged]
        return files

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".npz"):
            with np.load(filename, allow_pickle=False) as arrays:
                weights = {
                    k: v.astype(np.float32) if v.dtype == np.float16 else v
                    for k, v in arrays.items()
                }
            # names are relative to the backbone: detectron2 finds where they belong by their ends
            return {"model": weights, "matching_heuristics": True}
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> dict[str, Any]:
        return _read(f)

    def _load_model(self, checkpoint: dict[str, Any]):
        if not checkpoint.get("matching_heuristics"):
            weights = {k.removeprefix("module."): v for k, v in checkpoint["model"].items()}
            if not weights.keys() <= self.model.state_dict().keys() and detect_family(weights):
                weights, report = convert_state_dict(weights, self.model)
                self.logger.info("a published checkpoint of the family %s", report.family)
                for note in report.notes:
                    self.logger.info(note)
            checkpoint["model"] = weights
        return super()._load_model(checkpoint)


def _read(path: str) -> dict[str, Any]:
    """torch.load that runs no code from the file; many published files hold a Namespace."""
    allow = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)
    try:
        with allow([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise
        reason = str(error).strip().splitlines()[0]
        raise pickle.UnpicklingError(
            f"{path} holds more than tensors and plain values ({reason}): if you trust it, save "
            "its weights alone: torch.save(torch.load(path, weights_only=False)['model'], new_path)"
        ) from error


@contextlib.contextmanager
def _replacing(path: str):
    """Gives a temporary path that takes ``path``'s place once it is complete and on disk."""
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
