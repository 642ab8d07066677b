"""Training, evaluation, schedules and checkpoints on top of detectron2's engine."""

from .checkpoint import Checkpointer
from .run import Evaluation, evaluate, resolve_device, setup, train
from .schedule import EpochSchedule, LRFactors, RunLength, build_lr_multiplier, build_optimizer
from .trainer import Trainer

__all__ = [
    "Checkpointer",
    "EpochSchedule",
    "Evaluation",
    "LRFactors",
    "RunLength",
    "Trainer",
    "build_lr_multiplier",
    "build_optimizer",
    "evaluate",
    "resolve_device",
    "setup",
    "train",
]
