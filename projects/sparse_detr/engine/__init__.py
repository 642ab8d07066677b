"""Training, evaluation, schedules and checkpoints on top of detectron2's engine."""

from .best import BestCheckpoint
from .checkpoint import Checkpointer
from .ema import ModelEMA
from .optimizer import AdamW, LRFactors, build_optimizer
from .processes import launch
from .run import Evaluation, evaluate, setup, train
from .schedule import EpochSchedule, RunLength, build_lr_multiplier
from .trainer import Trainer

__all__ = [
    "AdamW",
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
