"""Images in, detections out: detectron2's ``DefaultPredictor`` for LazyConfigs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Final, overload

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .calibrate import token_rankings
from .config import published_weights, resolve_config, stored_classes
from .devices import clock, mixed_precision, resolve_device, resolve_dtype
from .dial import Dial
from .engine.checkpoint import Checkpointer
from .errors import UserError
from .keep_ratio import keep_ratio_range, set_keep_ratio
from .modeling import MeanRatio, SetDetector, pack_weights

logger = logging.getLogger(__name__)


def build_model(
    config: str | os.PathLike | DictConfig,
    weights: str | os.PathLike = "",
    overrides: Iterable[str] = (),
    device: str = "auto",
) -> SetDetector:
    """A detector in evaluation mode.

    Args:
        config: the output folder of a run (its config and last checkpoint are used), a shipped
            config's name, a config file, or a loaded config, which is not changed.
        weights: a checkpoint: ours, a published one, or detectron2's; "published" for the one that belongs
            to a shipped config (docs/model_zoo.md); empty for the run's, or else random weights.
        overrides: ``a.b=c``, as on the command line.
        device: "cuda", "cpu", or "auto" for the GPU if there is one.
    """
    return _build(config, weights, overrides, device)[1]


class Preparation:
    """(H, W, 3) uint8 in BGR order -> the model's input; small enough for the workers of a ``DataLoader``.

    Args:
        augmentations: the resizing of the test set.
        input_format: the model's order of channels, "RGB" or "BGR".
    """

    def __init__(self, augmentations: T.AugmentationList, input_format: str) -> None:
        self.augmentations = augmentations
        self.input_format = input_format

    def __call__(self, image: np.ndarray) -> dict:
        """A dict with ``image`` (3, h, w) uint8, resized, and ``height`` and ``width`` of what came.

        Raises:
            ValueError: ``image`` has another type or shape.
        """
        if not isinstance(image, np.ndarray):
            raise ValueError(
                f"expected an image (H, W, 3) as a uint8 numpy array, got {type(image).__name__}"
                + ("; cv2.imread returns None for a file it cannot read" if image is None else "")
            )
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                "expected an image (H, W, 3), uint8 from 0 to 255 in BGR order, "
                f"got an array of shape {image.shape} and dtype {image.dtype}"
            )
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        augmented = T.AugInput(image)
        self.augmentations(augmented)
        tensor = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


class Predictor:
    """Detects objects in single images or lists of them.

    Args:
        config, weights, overrides, device: see ``build_model``.
        threshold: drop detections whose score is lower.
        keep_ratio: share of the tokens that the encoder refreshes, in (0, 1], instead of the
            config's; for models whose encoder has one. Also an attribute that can be set. ``calibrate``
            makes it a mean, with a number of tokens for each image.
        latency_ms: instead of ``keep_ratio``, milliseconds that 95 of 100 calls may take: the keep ratio
            is found by a few passes at the first image of each size, see ``dial``, within the range
            that an elastic model was trained for. Also an attribute; the one that was set last counts.
        dtype: precision, a torch dtype or its name: torch.bfloat16 and torch.float16 are mixed precision;
            "auto" is bfloat16 where the hardware multiplies in it, else float32.

    Attributes:
        cfg, model: the config and the detector.
        class_names: of the classes that ``pred_classes`` counts; from the checkpoint or, if it has
            none, from the config or the config's test set if detectron2 knows it, else numbers.
        category_ids: of the same classes, the data set's where detectron2 knows it, else counted from 1.
        metadata: detectron2 ``Metadata`` with these names, for its ``Visualizer``.
        prepare: the ``Preparation`` of an image, and ``detect`` what then runs; ``__call__`` is both.
        input_format: "BGR", the order of channels that ``__call__`` takes, whatever the model's is.
        resizing: ``short_edge`` and ``max_size`` of the config's test set, in pixels.

    Raises:
        ValueError: there is no such config or checkpoint, the model has no keep ratio, or both
            ``keep_ratio`` and ``latency_ms`` are given.

    Example::

        predict = Predictor("output/my_run", threshold=0.5)
        instances = predict(cv2.imread("image.jpg"))["instances"]
    """

    input_format: Final = "BGR"  # SAHI asks for it

    def __init__(
        self,
        config: str | os.PathLike | DictConfig,
        weights: str | os.PathLike = "",
        *,
        overrides: Iterable[str] = (),
        device: str = "auto",
        threshold: float = 0.0,
        keep_ratio: float | None = None,
        latency_ms: float | None = None,
        dtype: torch.dtype | str = torch.float32,
    ):
        if keep_ratio is not None and latency_ms is not None:
            raise UserError(
                f"keep_ratio={keep_ratio} and latency_ms={latency_ms}: pass one, the other follows from it"
            )
        self.cfg, self.model, checkpoint = _build(config, weights, overrides, device)
        if checkpoint is None:
            logger.warning("no weights are given: they are random")
        pack_weights(self.model)
        augmentations = self.cfg.dataloader.test.mapper.augmentations
        self.prepare = Preparation(T.AugmentationList(instantiate(augmentations)), self.model.input_format)
        self.resizing = {
            k: augmentations[k]
            for k in ("short_edge", "max_size")
            if isinstance(augmentations, DictConfig) and k in augmentations
        }
        self.threshold = threshold
        self.dtype = resolve_dtype(dtype, self.model.device)
        self._dial: Dial | None = None
        if keep_ratio is not None:
            self.keep_ratio = keep_ratio
        self.latency_ms = latency_ms
        names = checkpoint.get("class_names") if checkpoint else None
        self.metadata = _metadata(self.cfg, self.model.num_classes, names)
        self.class_names = list(self.metadata.thing_classes)
        ids = self.metadata.get("thing_dataset_id_to_contiguous_id") or {}
        of_class = {index: category for category, index in ids.items()}
        self.category_ids = [of_class.get(i, i + 1) for i in range(len(self.class_names))]

    @property
    def keep_ratio(self) -> float | None:
        """Share of the tokens that the encoder refreshes; None if it has no such number
        or refreshes all."""
        return getattr(self.model.transformer.encoder, "keep_ratio", None)

    @keep_ratio.setter
    def keep_ratio(self, value: float) -> None:
        if value is None or not 0 < value <= 1:
            raise UserError(f"keep_ratio={value} must lie in (0, 1]")
        set_keep_ratio(self.model, value, f"keep_ratio={value}")
        self._dial = None

    @property
    def latency_ms(self) -> float | None:
        """What 95 of 100 calls may take; None where the keep ratio is fixed."""
        return None if self._dial is None else self._dial.latency_ms

    @latency_ms.setter
    def latency_ms(self, value: float | None) -> None:
        if value is None:
            self._dial = None
            return
        if not value > 0:
            raise UserError(f"latency_ms={value} must be positive")
        ratios = keep_ratio_range(self.model)
        if self.keep_ratio is None:  # which some encoders cannot change any more
            set_keep_ratio(self.model, ratios[1], f"latency_ms={value}")
        self._dial = Dial(value, self._clock, self.model.device.type, ratios)

    def calibrate(self, images: Iterable[np.ndarray], keep_ratio: float) -> MeanRatio:
        """Gives each image a number of tokens of its own from here on: ``keep_ratio`` of them on average
        over ``images``, which are like those to come and need no annotations.

        Returns:
            The rule, now the value of ``keep_ratio``; another predictor of the same weights takes it, too:
            ``Predictor(..., keep_ratio=rule)``.

        Raises:
            ValueError: the model has no keep ratio, there is no image, or ``keep_ratio`` is not in (0, 1].
        """
        if not 0 < keep_ratio <= 1:
            raise UserError(f"keep_ratio={keep_ratio} must lie in (0, 1]")
        with mixed_precision(self.model.device, self.dtype):
            rankings = token_rankings(self.model, ([self.prepare(image)] for image in images))
        rule = MeanRatio.calibrate(rankings, keep_ratio)
        self.keep_ratio = rule
        return rule

    def _clock(self) -> float:
        return clock(self.model.device)

    @overload
    def __call__(self, image: np.ndarray) -> dict: ...
    @overload
    def __call__(self, image: Sequence[np.ndarray]) -> list[dict]: ...
    def __call__(self, image: np.ndarray | Sequence[np.ndarray]) -> dict | list[dict]:
        """(H, W, 3) uint8 in BGR order, or a list of such images, which then run as one batch.

        Images of unlike sizes are padded to one; models with ``mask_padding=False`` (the published
        ones) may then answer a little differently than for each image alone.

        Returns:
            ``{"instances": Instances}`` with ``pred_boxes`` in pixels of the image, ``scores`` in
            descending order and ``pred_classes``; or a list of these.

        Raises:
            ValueError: an image has another type or shape.
        """
        if not isinstance(image, Sequence) or isinstance(image, str):
            return self([image])[0]
        if not image:
            return []
        if self._dial is None:
            return self.detect([self.prepare(one) for one in image])
        start = self._clock()
        entries = [self.prepare(one) for one in image]
        height, width = (max(entry["image"].shape[axis] for entry in entries) for axis in (1, 2))

        def run(ratio: float) -> list[dict]:
            set_keep_ratio(self.model, ratio, "latency_ms")
            return self.detect(entries)

        return self._dial((len(entries), height, width), run, start)

    @torch.no_grad()
    def detect(self, entries: list[dict]) -> list[dict]:
        """One batch of what ``prepare`` returned, see ``__call__``."""
        with mixed_precision(self.model.device, self.dtype):
            results = self.model(entries)
        return [{"instances": r["instances"][r["instances"].scores >= self.threshold]} for r in results]


def _build(
    config: str | os.PathLike | DictConfig, weights: str | os.PathLike, overrides: Iterable[str], device: str
) -> tuple[DictConfig, SetDetector, dict | None]:
    """The config, the model, and what its checkpoint, if there is one, holds besides weights."""
    where = resolve_device(device)
    cfg = resolve_config(config, overrides)
    run = not weights and not isinstance(config, DictConfig) and os.path.isdir(config) and os.fspath(config)
    if run and not Checkpointer(nn.Module(), run).has_checkpoint():
        raise UserError(f"{run} holds no checkpoint: pass weights=...")
    model = instantiate(cfg.model).to(where).eval()
    if run:
        return cfg, model, Checkpointer(model, run).resume_or_load("", resume=True)
    if not weights:
        return cfg, model, None
    if weights == "published":
        weights = published_weights(config)
    return cfg, model, Checkpointer(model).load(os.fspath(weights), checkpointables=[])


def _metadata(cfg: DictConfig, num_classes: int, names: Sequence[str] | None) -> Metadata:
    known = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    known = known if isinstance(known, str) else (known or [""])[0]
    registered = MetadataCatalog.get(known) if known in MetadataCatalog.list() else Metadata()
    if names is None:
        names = stored_classes(cfg) or registered.get("thing_classes")
    if names is None or len(names) != num_classes:
        names = [str(index) for index in range(num_classes)]
    if list(names) == registered.get("thing_classes"):
        return registered  # with its colours and category ids
    return Metadata(thing_classes=list(names))
