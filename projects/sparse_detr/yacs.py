"""The detectors for detectron2's yacs configs: ``MODEL.META_ARCHITECTURE: "SparseDETR"``.

A yacs file names a shipped LazyConfig and overrides in its terms, so there is one description of a
model, not two::

    cfg = get_cfg()
    add_sparse_detr_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DeformableDETR"
    cfg.MODEL.DETR.NUM_CLASSES = 3
    model = build_model(cfg)
"""

from __future__ import annotations

from detectron2.config import CfgNode, instantiate

from .config import get_config


def add_sparse_detr_config(cfg: CfgNode) -> None:
    """Add ``MODEL.DETR`` to ``cfg`` and set the input the detectors expect: RGB, ImageNet mean and
    standard deviation, images without objects kept for training."""
    cfg.MODEL.DETR = CfgNode()
    # Name of a shipped config (see list_configs()); empty: the architecture's own default.
    cfg.MODEL.DETR.CONFIG = ""
    cfg.MODEL.DETR.NUM_CLASSES = 80
    # Further "model.key=value" overrides of that config.
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
    if "DETR" not in cfg.MODEL:
        raise ValueError(
            "this config has no MODEL.DETR: call sparse_detr.yacs.add_sparse_detr_config(cfg) "
            "after detectron2.config.get_cfg()"
        )
    detr = cfg.MODEL.DETR
    lazy = get_config(detr.CONFIG or default_config, list(detr.OVERRIDES))
    lazy.model.update(
        num_classes=detr.NUM_CLASSES, pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD), input_format=cfg.INPUT.FORMAT,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    return {key: instantiate(value) for key, value in lazy.model.items() if key != "_target_"}
