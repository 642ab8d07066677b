"""The detector under the names of the papers, as detectron2's registry knows them (yacs users)."""

from __future__ import annotations

import sys

from detectron2.modeling import META_ARCH_REGISTRY

from ..errors import UserError
from .meta_arch import SetDetector


class DeformableDETR(SetDetector):
    """Deformable DETR (Zhu et al., ICLR 2021) and what configs compose on it."""

    default_config = "deformable_detr/deformable_detr_r50_two_stage_50ep"


class DINO(SetDetector):
    """DINO (Zhang et al., ICLR 2023) and what configs compose on it."""

    default_config = "dino/dino_r50_4scale_12ep"


# The same class under each paper's name: what differs is the encoder that its config composes.
class SparseDETR(DeformableDETR):
    """Sparse DETR (Roh et al., ICLR 2022)."""

    default_config = "sparse_detr/sparse_detr_r50_30_50ep"


class FocusDETR(DINO):
    """Focus-DETR (Zheng et al., ICCV 2023)."""

    default_config = "focus_detr/focus_detr_r50_4scale_12ep"


class LiteDETR(DINO):
    """Lite DETR (Li et al., CVPR 2023)."""

    default_config = "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep"


class SalienceDETR(DINO):
    """Salience DETR (Hou et al., CVPR 2024)."""

    default_config = "salience_detr/salience_detr_r50_4scale_12ep"


class RTDETR(DINO):
    """RT-DETR (Zhao et al., CVPR 2024)."""

    default_config = "rt_detr/rt_detr_r50_72ep"


def _register(*detectors: type[SetDetector]) -> None:
    """Makes the detectors known to detectron2; once more, after a reload, without effect.

    Raises:
        UserError: one of the names is another project's.
    """
    own = {__file__, sys.modules[SetDetector.__module__].__file__}
    taken = {}
    for detector in detectors:
        if detector.__name__ in META_ARCH_REGISTRY:
            known = META_ARCH_REGISTRY.get(detector.__name__)
            if getattr(sys.modules.get(known.__module__), "__file__", None) not in own:
                taken[detector.__name__] = known.__module__
    if taken:
        raise UserError(
            f"{__name__} registers {', '.join(taken)} in detectron2's META_ARCH_REGISTRY, where "
            f"{', '.join(sorted(set(taken.values())))} has put another class under that name: import "
            "one of the two in a process"
        )
    for detector in detectors:
        if detector.__name__ not in META_ARCH_REGISTRY:
            META_ARCH_REGISTRY.register(detector)


# SetDetector: for configs that have no name here (``MODEL.SPARSE_DETR.CONFIG``).
_register(SetDetector, DeformableDETR, DINO, SparseDETR, FocusDETR, LiteDETR, SalienceDETR, RTDETR)
