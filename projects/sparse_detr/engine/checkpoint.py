"""Checkpoints: written atomically, found again after a crash, and loaded from several sources.

``train.init_checkpoint`` may be one of our own files, a detectron2 ``.pkl``, a published ``.pth``
of the methods that this package implements (converted by ``engine.convert``), or a ``.npz`` of
numpy arrays under detectron2's backbone names. Files are read with ``weights_only``: an untrusted
checkpoint cannot run code. (``.pkl`` is a pickle by nature: load only those you trust.)

Where a run has kept a moving average of its weights, its checkpoints hold both: "model" is what
training goes on with, "model_ema" what the run evaluated. Whoever loads weights alone, to evaluate,
predict or fine-tune, gets the average.
"""

import argparse
import contextlib
import glob
import os
import pickle
import re
import shutil
import zipfile
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer

from .convert import convert_state_dict, detect_family

# what torch raises for a file that ends early or is garbage
_UNREADABLE = (EOFError, OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile)


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer with atomic writes, fall-back on resume, and more file types."""

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<save_dir>/<name>.pth``, then names it in ``last_checkpoint``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()}, **kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with replacing(path) as partial:
                torch.save(data, partial)
        except (OSError, RuntimeError) as error:  # torch's own writer knows no OSError
            free = shutil.disk_usage(self.save_dir).free / 2**20
            raise OSError(
                f"cannot write the checkpoint {path}: {str(error).splitlines()[0]} "
                f"({free:.0f} MiB are free there). The checkpoints before it are untouched: "
                "make room, then go on with --resume"
            ) from error
        if self.checkpointables:  # a run can go on from it
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with (
            replacing(os.path.join(self.save_dir, "last_checkpoint")) as partial,
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
        if self.checkpointables and self.save_to_disk:  # left by a run that was killed
            for partial in glob.glob(os.path.join(glob.escape(self.save_dir), "*.pth.*.tmp")):
                os.remove(partial)
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

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise ValueError(f"train.init_checkpoint: there is no file {os.path.abspath(path)}")
        wanted = self.checkpointables if checkpointables is None else checkpointables
        self._weights_alone = not wanted
        return super().load(path, checkpointables)

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
        if self._weights_alone and "n_averaged" in checkpoint.get("model_ema", ()):
            self.logger.info("taking the moving average of the weights")
            average = checkpoint.pop("model_ema")
            del average["n_averaged"]  # the other names have the prefix "module."
            checkpoint["model"] = average
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
def replacing(path: str):
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
