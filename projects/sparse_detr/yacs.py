"""The detectors for detectron2's yacs configs: ``MODEL.META_ARCHITECTURE: "SparseDETR"``.

A yacs file names a shipped LazyConfig and overrides in its terms, so there is one description of a
model, not two::

    cfg = get_cfg()
    add_sparse_detr_config(cfg)
    cfg.merge_from_file("configs/yacs/sparse_detr_r50.yaml")
    cfg.MODEL.SPARSE_DETR.NUM_CLASSES = 3
    DefaultPredictor(cfg)

detectron2's ``DefaultTrainer`` optimises by SGD, which these models do not learn with; give it
theirs::

    class Trainer(DefaultTrainer):
        build_optimizer = staticmethod(build_optimizer)
"""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import GradientClipType, maybe_add_gradient_clipping

from .engine.checkpoint import fit_weights
from .engine.optimizer import build_optimizer as optimizer_of_recipe
from .engine.optimizer import clip_in_step
from .errors import UserError
from .modeling import SetDetector  # the import registers the architectures
from .yacs_config import from_yacs, unread_yacs_keys

logger = logging.getLogger(__name__)

SetDetector.yacs_fit_weights = staticmethod(fit_weights)

# What detectron2's own optimizers read, and this package's does not.
_SGD_KEYS = ("MOMENTUM", "NESTEROV", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS", "BIAS_LR_FACTOR")


def _explain_full_model(value: object) -> None:
    """The answer to detectron2's search for a kind of gradient clipping that it does not have."""
    if value == "full_model":
        raise UserError(
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE=full_model is of sparse_detr.yacs.build_optimizer, and this "
            "trainer builds detectron2's optimizer (SGD, with which these models do not learn). Two lines "
            "are missing:\n    class Trainer(DefaultTrainer):\n"
            "        build_optimizer = staticmethod(sparse_detr.yacs.build_optimizer)"
        )


GradientClipType._missing_ = staticmethod(_explain_full_model)


def add_sparse_detr_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SPARSE_DETR`` to ``cfg`` and set the input the detectors expect: RGB, ImageNet mean
    and standard deviation, images without objects kept for training.

    The node is the package's, for all its detectors. ``MODEL.DETR``, which it was once called, is
    also that of DETR's own detectron2 wrapper: one of that kind is left alone.
    """
    add_node(cfg)
    if "DETR" not in cfg.MODEL:  # files and code from before the new name are still read
        cfg.MODEL.DETR = CfgNode(new_allowed=True)
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False


def add_node(cfg: CfgNode) -> None:
    """Add ``MODEL.SPARSE_DETR`` alone: all else stays detectron2's, unless a file sets it."""
    cfg.MODEL.SPARSE_DETR = CfgNode()
    # A LazyConfig's file, or a shipped one's name (see list_configs()); empty: the architecture's.
    cfg.MODEL.SPARSE_DETR.CONFIG = ""
    cfg.MODEL.SPARSE_DETR.NUM_CLASSES = 80
    # "model.key=value" overrides of that config, which win over the numbers of this one.
    cfg.MODEL.SPARSE_DETR.OVERRIDES = []


def build_optimizer(cfg: CfgNode, model: SetDetector) -> torch.optim.Optimizer:
    """The optimizer of the model's LazyConfig (AdamW, less for the backbone) with ``cfg.SOLVER``'s
    learning rate, weight decay and gradient clipping.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` may be "full_model": the norm over all parameters, as the
    published models are trained. detectron2's "norm" clips each parameter by itself.
    """
    if unread := unread_yacs_keys(cfg, "SOLVER", _SGD_KEYS):
        logger.warning("not read by this optimizer, AdamW of the model's config: %s", ", ".join(unread))
    detector: SetDetector = getattr(model, "module", model)  # DistributedDataParallel's
    optimizer = optimizer_of_recipe(from_yacs(cfg, detector.default_config).optimizer, model)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, optimizer)
    if clip.ENABLED:
        clip_in_step(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer
