"""Training, evaluation, schedules and checkpoints on top of detectron2's engine."""

from .best import BestCheckpoint
from .checkpoint import Checkpointer
from .ema import ModelEMA
from .processes import launch
from .run import Evaluation, evaluate, setup, train
from .schedule import EpochSchedule, LRFactors, RunLength, build_lr_multiplier, build_optimizer
from .trainer import Trainer

__all__ = [
    "BestCheckpoint",
    "Checkpointer",
    "EpochSchedule",
    "Evaluation",
    "LRFactors",
    "ModelEMA",
    "RunLength",
    "Trainer",
    "build_lr_multiplier",
    "build_optimizer",
    "evaluate",
    "launch",
    "setup",
    "train",
]
