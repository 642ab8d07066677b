"""One image in, detections out: detectron2's ``DefaultPredictor`` for LazyConfigs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .config import load_config, resolve_classes
from .engine.checkpoint import Checkpointer


def build_model(config: str | DictConfig, weights: str = "", overrides: Iterable[str] = (),
                device: str = "auto") -> nn.Module:
    """A detector in evaluation mode.

    Args:
        config: a shipped config's name, a config file, or a loaded config.
        weights: a checkpoint: ours, a published one, or detectron2's; empty for random weights.
        overrides: ``a.b=c``, as on the command line.
        device: "cuda", "cpu", or "auto" for the GPU if there is one.
    """
    cfg = load_config(config, overrides) if isinstance(config, str) else config
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolve_classes(cfg)
    model = instantiate(cfg.model).to(device).eval()
    if weights:
        Checkpointer(model).load(weights, checkpointables=[])
    return model


class Predictor:
    """Detects objects in single images or lists of them.

    Args:
        config: the output folder of a run (its config and last checkpoint are used), or what
            ``build_model`` takes.
        weights, overrides, device: see ``build_model``.
        threshold: drop detections whose score is lower.

    ``metadata`` has the names of the classes, ``thing_classes``, where config or data tell them.

    Example::

        predict = Predictor("output/my_run", threshold=0.5)
        instances = predict(cv2.imread("image.jpg"))["instances"]
    """

    def __init__(self, config: str | DictConfig, weights: str = "", *,
                 overrides: Iterable[str] = (), device: str = "auto", threshold: float = 0.0):
        if isinstance(config, str) and os.path.isdir(config):
            weights = weights or _last_checkpoint(config)
            config = os.path.join(config, "config.yaml")
        self.cfg = load_config(config, overrides) if isinstance(config, str) else config
        self.model = build_model(self.cfg, weights, device=device)
        self.augmentations = T.AugmentationList(
            instantiate(self.cfg.dataloader.test.mapper.augmentations)
        )
        self.metadata = _metadata(self.cfg)
        self.threshold = threshold

    @torch.no_grad()
    def __call__(self, image: np.ndarray | Sequence[np.ndarray]) -> dict | list[dict]:
        """(H, W, 3) uint8 in BGR order, or a list of such images.

        Returns:
            ``{"instances": Instances}`` with boxes in pixels of the image, or a list of these.
        """
        if isinstance(image, np.ndarray):
            return self([image])[0]
        results = self.model([self._prepare(one) for one in image])
        return [
            {"instances": r["instances"][r["instances"].scores >= self.threshold]} for r in results
        ]

    def _prepare(self, image: np.ndarray) -> dict:
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected an image (H, W, 3), got an array of shape {image.shape}")
        height, width = image.shape[:2]
        if self.model.input_format == "RGB":
            image = image[:, :, ::-1]
        augmented = T.AugInput(image)
        self.augmentations(augmented)
        tensor = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


def _metadata(cfg: DictConfig) -> Metadata:
    """Of the classes a run learned (its config.yaml has their names), else of the test set."""
    if classes := OmegaConf.select(cfg, "data.classes"):
        return Metadata(thing_classes=list(classes))
    names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    return MetadataCatalog.get(names) if isinstance(names, str) else Metadata()


def _last_checkpoint(folder: str) -> str:
    path = Checkpointer(nn.Module(), folder).get_checkpoint_file()
    if not path:
        raise ValueError(f"{folder} holds no checkpoint (no last_checkpoint file): pass weights=...")
    return path
