"""Checkpoints: written atomically, found again after a crash, and loaded from several sources.

``train.init_checkpoint`` may be one of our own files, a published ``.pth`` of the methods that this
package implements or a folder of transformers (converted by ``engine.convert``), or a backbone:
detectron2's ``.pkl``, torchvision's or timm's ResNet, Swin, any of timm's for a ``TimmBackbone``; also as
``.safetensors`` or ``.npz``; and, in their place, ``published://...``, ``hf://...`` or ``timm://...``
(``engine.sources``). No file can run code
(``engine.weights``).

Where a run has kept a moving average of its weights, its checkpoints hold both: "model" is what
training goes on with, "model_ema" what the run evaluated. Whoever loads weights alone, to evaluate,
predict or fine-tune, gets the average.
"""

import contextlib
import glob
import os
import re
import shutil
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import UserError, listed
from ..modeling.meta_arch import SetDetector
from .convert import convert_state_dict, detect_family
from .fine_tune import (
    adapt_classes,
    backbone_names,
    class_counts,
    other_class_counts,
    resnet_kind,
    resnet_mismatch,
    resnet_origin,
)
from .sources import weights_in
from .weights import WeightsError, read_npz, read_pickle, read_safetensors, read_torch, read_zip

_READERS = {".npz": read_npz, ".pkl": read_pickle, ".safetensors": read_safetensors, ".zip": read_zip}


class WriteError(UserError, OSError):
    """A checkpoint cannot be written."""


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer with atomic writes, fall-back on resume, and more file types.

    Args:
        class_names: stored in every file, for ``Predictor``, and compared with those that a file
            holds: weights of other classes, or in another order, are fine-tuned or not used.
        fine_tune: ``load`` is the start of a training: a backbone alone will do, and tensors with a
            row per class are initialised anew where their number differs. Otherwise, and when a run
            is resumed, the weights must be the model's own: all of them, in its shapes.
        others: see detectron2's ``DetectionCheckpointer``.
    """

    _content: dict[str, Any] | None = None  # of the file that ``resume_or_load`` has read

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: list[str] | None = None,
        fine_tune: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(model, save_dir, **others)
        self.class_names = class_names
        self.fine_tune = fine_tune

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<save_dir>/<name>.pth``, then names it in ``last_checkpoint``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()}, **kwargs)
        if self.class_names is not None:
            data["class_names"] = list(self.class_names)
        if hasattr(self.model, "exact_sizes"):
            data["exact_sizes"] = self.model.exact_sizes
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with replacing(path) as partial:
                torch.save(data, partial)
        except (OSError, RuntimeError) as error:  # torch's own writer knows no OSError
            free, needed = shutil.disk_usage(self.save_dir).free / 2**20, _num_bytes(data) / 2**20
            raise WriteError(
                f"cannot write the checkpoint {path}: {str(error).splitlines()[0]} "
                f"({free:.0f} MiB are free there, {needed:.0f} MiB are needed). "
                + (
                    "The checkpoints before it are untouched: make room, then go on with --resume"
                    if run_checkpoints(self.save_dir)
                    else "There is no checkpoint before it: make room, then start again"
                )
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

    def newest(self) -> str:
        """The file that ``resume_or_load`` would try first; empty if there is none."""
        return next(iter(self._candidates()), "")

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the newest readable checkpoint of the run if ``resume``, else ``path``'s weights.

        A run that goes on (not who only reads it) sets those aside that it has found broken, as
        ``<name>.unreadable``, and names the one that it took in ``last_checkpoint``.

        Raises:
            ValueError: ``resume``, and none of the checkpoints that are there can be read, or the
                newest is of another model, of other classes or of another kind of run.
        """
        if self.checkpointables and self.save_to_disk:  # left by a run that was killed
            for partial in glob.glob(os.path.join(glob.escape(self.save_dir), "*.pth.*.tmp")):
                os.remove(partial)
        candidates = self._candidates() if resume else []
        if not candidates:
            return self.load(path, checkpointables=[])
        for number, candidate in enumerate(candidates):
            try:
                self._content = read_torch(candidate)
            except WeightsError as error:
                self.logger.error("%s. Trying the checkpoint before it", error)
                continue
            self.fine_tune = False
            try:
                loaded = self.load(candidate)
            except ValueError as error:
                raise UserError(f"{candidate}: {error}") from error
            if number and self.checkpointables and self.save_to_disk:
                for broken in candidates[:number]:
                    os.replace(broken, f"{broken}.unreadable")
                    self.logger.warning("set aside as %s.unreadable, which may be deleted", broken)
                self.tag_last_checkpoint(os.path.basename(candidate))
            return loaded
        raise UserError(
            f"none of the checkpoints in {self.save_dir} can be read "
            f"({', '.join(map(os.path.basename, candidates))}): "
            "delete them, or start without --resume"
        )

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        if os.path.isdir(path):
            path = weights_in(path)
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise UserError(f"weights: there is no file {os.path.abspath(path)}")
        wanted = self.checkpointables if checkpointables is None else checkpointables
        self._weights_alone = not wanted
        try:
            return super().load(path, checkpointables)
        except OSError as error:
            if "://" not in path:
                raise
            raise UserError(
                f"cannot fetch the weights {path} ({error}): fetch them elsewhere and pass "
                "train.init_checkpoint=/path/to/them"
            ) from None

    def _candidates(self) -> list[str]:
        """Checkpoints to resume from: the tagged one, then the others from new to old."""
        files = run_checkpoints(self.save_dir)[::-1]
        tagged = self.get_checkpoint_file()
        if tagged and os.path.isfile(tagged):
            files = [tagged] + [f for f in files if f != tagged]
        return files

    def saved_before(self, iteration: int) -> list[str]:
        """The run's numbered checkpoints up to an iteration, from old to new."""
        numbers = {f: re.search(r"model_(\d+)\.pth$", f) for f in run_checkpoints(self.save_dir)}
        return sorted(f for f, number in numbers.items() if number and int(number[1]) < iteration)

    def _load_file(self, filename: str) -> dict[str, Any]:
        for ending, read in _READERS.items():
            if filename.endswith(ending):
                return read(filename)
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> dict[str, Any]:
        content, self._content = self._content, None
        return read_torch(f) if content is None else content

    def _load_model(self, checkpoint: dict[str, Any]):
        if self._weights_alone and "n_averaged" in checkpoint.get("model_ema", ()):
            self.logger.info("taking the moving average of the weights")
            average = checkpoint.pop("model_ema")
            del average["n_averaged"]  # the other names have the prefix "module."
            checkpoint["model"] = average
        elif self._weights_alone and (average := checkpoint.pop("ema_state", None)):  # detrex's
            self.logger.info("taking the moving average of the weights")
            checkpoint["model"] = {**checkpoint["model"], **average}
        elif self._weights_alone and "ema" in checkpoint["model"]:  # RT-DETR's authors publish nothing else
            checkpoint["model"] = checkpoint["model"]["ema"]["module"]
        if not checkpoint.get("matching_heuristics"):  # detectron2's, of names by their ends
            weights, origin = self.fitted(checkpoint["model"], checkpoint.get("class_names"))
            checkpoint.update(model=weights, __author__=origin)
            self._check_names(checkpoint.get("class_names"))
        origin = checkpoint.get("__author__")
        if origin not in ("torchvision", "Caffe2"):
            origin = resnet_origin(checkpoint["model"])
        if problem := resnet_mismatch(self.model, origin):
            self.logger.warning(problem)
        elif origin is None and self.fine_tune and (kind := resnet_kind(self.model)):
            self.logger.info(
                "the model expects weights of %s's kind of ResNet, and the file does not tell whose it has",
                kind,
            )
        if any(name.startswith("transformer.") for name in checkpoint["model"]):
            self._tell_sizes(checkpoint.get("exact_sizes", False))
        loaded = super()._load_model(checkpoint)
        missing = {*loaded.missing_keys, *(name for name, *_ in loaded.incorrect_shapes)}
        self.check_missing(missing)
        if missing == {n for n in self.model.state_dict() if not n.startswith("backbone.")}:
            self.logger.info("the weights are a backbone's: the rest of the model starts anew")
            loaded.missing_keys.clear()  # said in one line
        return loaded

    def fitted(
        self, weights: dict[str, Any], class_names: list[str] | None = None
    ) -> tuple[dict[str, Any], str | None]:
        """``weights`` under the model's names and in its shapes, and whose kind of ResNet they hold,
        if that is known.

        Raises:
            UserError: they have other shapes; or other classes, and no training is to start from them.
        """
        weights, origin = self._renamed({k.removeprefix("module."): v for k, v in weights.items()})
        if not self.fine_tune:
            self._check_shapes(weights, class_names)
        elif done := adapt_classes(weights, self.model):
            self.logger.warning(done)
        return weights, origin

    def _tell_sizes(self, trained_exact: bool) -> None:
        """Says so where a detector's weights were trained with other reference points."""
        exact = getattr(self.model, "exact_sizes", trained_exact)
        if exact == trained_exact:
            return
        before, now = ("as published", "exact") if exact else ("exact", "as published")
        if self.fine_tune:
            self.logger.info("sizes: trained %s, from now on %s (model.exact_sizes=%s)", before, now, exact)
        else:
            self.logger.warning(
                "the weights were trained with sizes %s, and the model takes them %s: results will be worse; "
                "set model.exact_sizes=%s (docs/reference_points.md)",
                before,
                now,
                trained_exact,
            )

    def _renamed(self, weights: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The weights under the model's names, and whose kind of ResNet they hold, if known."""
        if weights.keys() <= self.model.state_dict().keys():
            return weights, None
        if detect_family(weights):
            weights, report = convert_state_dict(weights, self.model)
            self.logger.info("a published checkpoint of the family %s", report.family)
            for note in report.notes:
                self.logger.info(note)
            return weights, "torchvision"
        origin = "torchvision" if "layer1.0.conv1.weight" in weights else None
        return backbone_names(weights, self.model) or weights, origin

    def _check_shapes(self, weights: dict[str, Any], names: list[str] | None) -> None:
        if changed := other_class_counts(weights, self.model):
            old, new = class_counts(changed)
            raise UserError(
                f"the weights were trained for {old} classes, the model has {new}: to evaluate or "
                "resume them, give the data's JSON all the training set's categories, in their "
                f"order{f' ({listed(names, 5)})' if names else ''}; some may have no object. Or use "
                "the config.yaml of their run; where classes are not read from a JSON, "
                f"model.num_classes={old}. For other classes fine-tune them (train, without --resume)"
            )
        expected = self.model.state_dict()
        wrong = [
            f"{name}: {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in weights.keys() & expected.keys()
            if weights[name].shape != expected[name].shape
        ]
        if wrong:
            raise UserError(
                f"the weights are not the model's: {len(wrong)} tensors have other shapes "
                f"({', '.join(sorted(wrong)[:3])}): use the config that they were trained with"
            )

    def _check_names(self, trained: list[str] | None) -> None:
        """Compares the classes of the data with those that the weights were ``trained`` for."""
        names = self.class_names
        if not names or not trained or len(names) != len(trained):
            return  # another number is found by the shapes
        first = next((k for k, (a, b) in enumerate(zip(names, trained)) if a != b), None)
        if first is None:
            return
        differ = (
            f"class {first} is {names[first]!r} in the data, {trained[first]!r} in the weights "
            f"(data: {listed(names, 5)}; weights: {listed(trained, 5)})"
        )
        if not self.fine_tune:
            raise UserError(
                f"the weights were trained for other classes, or in another order: {differ}. Give "
                "the JSON's categories the ids that put them in the weights' order"
            )
        self.logger.warning("fine-tuning for other classes, or in another order: %s", differ)

    def check_missing(self, missing: set[str]) -> None:
        """Raises a ``UserError`` where too much of the model would stay as it was initialised."""
        if not self.fine_tune:
            needed = sorted(name for name in missing if not name.startswith(training_only(self.model)))
            if needed:
                raise UserError(
                    f"the weights are not the model's: {len(needed)} of its tensors are "
                    f"missing ({', '.join(needed[:3])}, ...): use the config that they were "
                    "trained with. A backbone alone can only start a training"
                )
        elif missing >= {name for name, _ in self.model.named_parameters()}:
            raise UserError(
                "train.init_checkpoint (yacs: MODEL.WEIGHTS): not one of its tensors fits the model, so "
                "training would start from nothing; leave it empty if that is what you want"
            )


def fit_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Brings what detectron2's checkpointer loads, in place, to what ``Checkpointer`` would load.

    A model in training mode is to be trained from the weights, another one is to predict with them.

    Raises:
        UserError: the weights are not the model's, or not all of them.
    """
    checkpointer = Checkpointer(model, fine_tune=model.training)
    fitted, _ = checkpointer.fitted(weights)
    checkpointer.check_missing(model.state_dict().keys() - fitted.keys())
    weights.clear()
    weights.update(fitted)


def fit_published(model: SetDetector, weights: dict[str, Any]) -> None:
    """``fit_weights`` for published names; any others stay what torch makes of them."""
    if detect_family(weights):
        fit_weights(model, weights)


SetDetector.fit_weights = staticmethod(fit_published)  # whoever loads, detectron2's checkpointer too


def _num_bytes(content: Any) -> int:
    """Of the tensors in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, list | tuple):
        return 0
    return sum(map(_num_bytes, content))


def training_only(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters that inference runs without: ``training_only`` of the model's parts."""
    return tuple(
        f"{path}.{name}.".lstrip(".")
        for path, module in model.named_modules()
        for name in getattr(module, "training_only", ())
    )


def run_checkpoints(folder: str) -> list[str]:
    """The files that a run can go on from, by their time of writing, the newest last."""
    files = glob.glob(os.path.join(glob.escape(folder), "model_*.pth"))
    files = [f for f in files if re.fullmatch(r"model_(\d+|final)\.pth", os.path.basename(f))]
    return sorted(files, key=lambda f: (os.path.getmtime(f), f))


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
