"""The LazyConfig behind a yacs config of detectron2's.

A module of its own: ``yacs``, for users, imports the models, and these are built from here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from detectron2.config import CfgNode, get_cfg
from omegaconf import DictConfig, OmegaConf

from .config import apply_overrides, get_config
from .errors import UserError

logger = logging.getLogger(__name__)


def from_yacs(cfg: CfgNode, default: str) -> DictConfig:
    """The LazyConfig behind a yacs config, with the numbers and the overrides of that one.

    Args:
        cfg: with the node ``MODEL.SPARSE_DETR``, see ``yacs.add_sparse_detr_config``.
        default: shipped config in use where the node names none.

    Raises:
        UserError: there is no such node, no such config, or an override does not fit it.
    """
    node = _yacs_node(cfg)
    if not node["CONFIG"] and not default:
        raise UserError(
            f"MODEL.META_ARCHITECTURE={cfg.MODEL.META_ARCHITECTURE} has no config of its own: name one in "
            "MODEL.SPARSE_DETR.CONFIG (sparse_detr.list_configs() has them)"
        )
    lazy = get_config(node["CONFIG"] or default)
    lazy.model.update(
        num_classes=_yacs_num_classes(cfg, node),
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
        input_format=cfg.INPUT.FORMAT,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    if "optimizer" in lazy:
        lazy.optimizer.update(lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    _follow_yacs_backbone(cfg, lazy)
    apply_overrides(lazy, node["OVERRIDES"])
    if unread := unread_yacs_keys(cfg, "MODEL", skip=_YACS_READ):
        logger.warning(
            "these keys of detectron2's change nothing in this model: %s. It is described by "
            "MODEL.SPARSE_DETR.CONFIG=%s and MODEL.SPARSE_DETR.OVERRIDES",
            ", ".join(unread),
            node["CONFIG"] or default,
        )
    return lazy


# The parts of MODEL that the detectors or detectron2's engine read, or ``from_yacs`` speaks about itself.
_YACS_READ = (
    "META_ARCHITECTURE DEVICE WEIGHTS PIXEL_MEAN PIXEL_STD SPARSE_DETR DETR "
    "BACKBONE.FREEZE_AT RESNETS.DEPTH ROI_HEADS.NUM_CLASSES RETINANET.NUM_CLASSES"
).split()


def unread_yacs_keys(
    cfg: CfgNode, section: str, names: Iterable[str] | None = None, skip: Iterable[str] = ()
) -> list[str]:
    """``SECTION.KEY=value`` of detectron2's keys that were changed: those below ``section``.

    Args:
        names: these keys of the section only.
        skip: keys of the section, or whole nodes in it, to leave out.
    """
    skip = set(skip)

    def changed(node: CfgNode, plain: CfgNode, path: str) -> Iterator[str]:
        for name, value in plain.items():
            here = f"{path}.{name}"
            if here.split(".", 1)[1] in skip or name not in node:
                continue
            if isinstance(value, CfgNode):
                yield from changed(node[name], value, here)
            elif _listed(node[name]) != _listed(value) and (names is None or name in names):
                yield f"{here}={node[name]}"

    return list(changed(cfg[section], get_cfg()[section], section))


def _listed(value: object) -> object:
    """A YAML file makes lists of tuples."""
    return list(map(_listed, value)) if isinstance(value, tuple | list) else value


def _yacs_num_classes(cfg: CfgNode, node: dict) -> int:
    """``MODEL.SPARSE_DETR.NUM_CLASSES``, or detectron2's own keys for it where they alone were set."""
    own, usual = node["NUM_CLASSES"], 80
    others = {
        f"MODEL.{head}.NUM_CLASSES": cfg.MODEL[head].NUM_CLASSES
        for head in ("ROI_HEADS", "RETINANET")
        if cfg.MODEL[head].NUM_CLASSES not in (own, usual)
    }
    if not others:
        return own
    told = " and ".join(f"{key}={value}" for key, value in others.items())
    if own != usual or len(set(others.values())) > 1:
        raise UserError(
            f"MODEL.SPARSE_DETR.NUM_CLASSES={own}, but {told}: the first is this model's; set it, and "
            f"leave the others at {usual}"
        )
    logger.info("%s is followed; this model's own key is MODEL.SPARSE_DETR.NUM_CLASSES", told)
    return next(iter(others.values()))


def _follow_yacs_backbone(cfg: CfgNode, lazy: DictConfig) -> None:
    """What detectron2's keys say of a ResNet has one meaning here, too; of other backbones it has none."""
    plain, unread = get_cfg().MODEL, []
    for section, key, target in (
        ("BACKBONE", "FREEZE_AT", "model.backbone.freeze_at"),
        ("RESNETS", "DEPTH", "model.backbone.stages.depth"),
    ):
        value = cfg.MODEL[section][key]
        if value == plain[section][key]:
            continue
        if OmegaConf.select(lazy, target) is None:
            unread.append(f"MODEL.{section}.{key}={value}")
        elif OmegaConf.select(lazy, target) != value:
            OmegaConf.update(lazy, target, value)
            logger.info("MODEL.%s.%s=%s is followed: %s=%s", section, key, value, target, value)
    if unread:
        logger.warning("this model's backbone has no such setting: %s", ", ".join(unread))


def _yacs_node(cfg: CfgNode) -> dict:
    """``MODEL.SPARSE_DETR``, with what stands under its former name ``MODEL.DETR``.

    That is also the node of DETR's own detectron2 wrapper: it is read only if all it holds is ours.
    """
    known = {"CONFIG", "NUM_CLASSES", "OVERRIDES"}
    node, former = dict(cfg.MODEL.get("SPARSE_DETR", {})), cfg.MODEL.get("DETR", {})
    if former and former.keys() <= known and (former.is_new_allowed() or former.keys() - {"NUM_CLASSES"}):
        logger.warning("MODEL.DETR is now MODEL.SPARSE_DETR: rename it; %s is taken from it", dict(former))
        node.update(former)
    if not known <= node.keys():
        raise UserError(
            "this config has no MODEL.SPARSE_DETR: call sparse_detr.yacs.add_sparse_detr_config(cfg) "
            "after detectron2.config.get_cfg()"
        )
    return node
