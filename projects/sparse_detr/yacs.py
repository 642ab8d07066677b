"""The detectors for detectron2's yacs configs: ``MODEL.META_ARCHITECTURE: "SparseDETR"``.

A yacs file names a shipped LazyConfig and overrides in its terms, so there is one description of a
model, not two::

    cfg = get_cfg()
    add_sparse_detr_config(cfg)
    cfg.merge_from_file("configs/yacs/sparse_detr_r50.yaml")
    cfg.MODEL.DETR.NUM_CLASSES = 3
    DefaultPredictor(cfg)

detectron2's ``DefaultTrainer`` optimises by SGD, which these models do not learn with; give it
theirs::

    class Trainer(DefaultTrainer):
        build_optimizer = staticmethod(build_optimizer)
"""

from __future__ import annotations

import importlib

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.solver.build import maybe_add_gradient_clipping
from omegaconf import DictConfig
from torch import nn

from .config import apply_overrides, get_config


def add_sparse_detr_config(cfg: CfgNode) -> None:
    """Add ``MODEL.DETR`` to ``cfg`` and set the input the detectors expect: RGB, ImageNet mean and
    standard deviation, images without objects kept for training."""
    # Registers the architectures; by name, as they import this module for their `from_config`.
    importlib.import_module(".modeling", __package__)
    cfg.MODEL.DETR = CfgNode()
    # A LazyConfig's file, or a shipped one's name (see list_configs()); empty: the architecture's.
    cfg.MODEL.DETR.CONFIG = ""
    cfg.MODEL.DETR.NUM_CLASSES = 80
    # "model.key=value" overrides of that config, which win over the numbers of this one.
    cfg.MODEL.DETR.OVERRIDES = []
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False


def constructor_arguments(cfg: CfgNode, default_config: str) -> dict:
    """The built parts of ``cfg``'s detector, as keyword arguments of its class.

    Raises:
        ValueError: ``cfg`` has no ``MODEL.DETR``.
    """
    lazy = _lazy_config(cfg, default_config)
    lazy.model.update(
        num_classes=cfg.MODEL.DETR.NUM_CLASSES,
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
        input_format=cfg.INPUT.FORMAT,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    apply_overrides(lazy, cfg.MODEL.DETR.OVERRIDES)
    return {key: instantiate(value) for key, value in lazy.model.items() if key != "_target_"}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the model's LazyConfig (AdamW, less for the backbone) with ``cfg.SOLVER``'s
    learning rate, weight decay and gradient clipping.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` may be "full_model": the norm over all parameters, as the
    published models are trained. detectron2's "norm" clips each parameter by itself.
    """
    lazy = _lazy_config(cfg, getattr(model, "module", model).default_config)
    lazy.optimizer.update(lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    apply_overrides(lazy, cfg.MODEL.DETR.OVERRIDES)
    lazy.optimizer.params.model = model
    optimizer = instantiate(lazy.optimizer)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, optimizer)
    if clip.ENABLED:

        def clip_gradients(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_gradients)
    return optimizer


def _lazy_config(cfg: CfgNode, default_config: str) -> DictConfig:
    if "DETR" not in cfg.MODEL:
        raise ValueError(
            "this config has no MODEL.DETR: call sparse_detr.yacs.add_sparse_detr_config(cfg) "
            "after detectron2.config.get_cfg()"
        )
    return get_config(cfg.MODEL.DETR.CONFIG or default_config)
