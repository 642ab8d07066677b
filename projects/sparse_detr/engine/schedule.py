"""How long to train and how the learning rate falls, in numbers that no batch size spoils.

Configs speak of epochs; iterations follow here, in code, from the size of the data set and the
total batch size, so that neither an override of the batch size nor another data set leaves a stale
number behind.
"""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import instantiate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler, ParamScheduler
from omegaconf import DictConfig

from ..errors import UserError

logger = logging.getLogger(__name__)

# At the least between two checkpoints where the config leaves it to the epochs: one has some 0.5 GB.
CHECKPOINT_ITERS = 200


@dataclass(frozen=True)
class RunLength:
    """A run in iterations; ``epoch_iters``, images / total batch size, need not be whole."""

    max_iter: int
    epoch_iters: float
    eval_period: int
    checkpoint_period: int

    @classmethod
    def from_config(
        cls, train: DictConfig, num_images: int | None, total_batch_size: int | None
    ) -> "RunLength":
        """Resolves the config's ``train`` section.

        Args:
            train: uses ``max_iter`` (iterations; wins if it is set), else ``epochs``;
                ``eval_period`` and ``checkpointer.period`` (iterations; None: once per epoch,
                checkpoints after the first epoch that ends ``CHECKPOINT_ITERS`` or more behind the last).
            num_images, total_batch_size: of the training set; None if the loader does not tell.
        """
        for name in ("max_iter", "epochs"):
            if train[name] is not None and train[name] <= 0:
                raise UserError(f"train.{name}={train[name]} must be above 0, or null")
        if num_images and total_batch_size:
            epoch_iters = num_images / total_batch_size
        elif train.max_iter:
            epoch_iters = math.nan
        else:
            raise UserError(
                "the training loader does not tell its number of images, so train.epochs cannot be "
                "turned into iterations: pass train.max_iter=..., or build the loader with "
                "sparse_detr.data.build_train_loader"
            )
        if not train.max_iter and not train.epochs:
            raise UserError("set train.epochs or train.max_iter to say how long to train")
        max_iter = train.max_iter or math.ceil(train.epochs * epoch_iters)
        epoch = max_iter if math.isnan(epoch_iters) else max(1, round(epoch_iters))
        return cls(
            max_iter=int(max_iter),
            epoch_iters=epoch_iters,
            eval_period=epoch if train.eval_period is None else int(train.eval_period),
            checkpoint_period=(
                epoch * math.ceil(CHECKPOINT_ITERS / epoch)
                if train.checkpointer.period is None
                else int(train.checkpointer.period)
            ),
        )


class EpochSchedule(ParamScheduler):
    """Learning-rate multiplier: linear warm-up, then a factor ``gamma`` at every milestone.

    ``build`` makes it for a run of known length. Called as any fvcore scheduler, by a trainer that
    does not know how many images an epoch has, it takes ``max_iter`` for ``epochs`` epochs.

    Args:
        milestones: epochs (fractions allowed) at whose end the learning rate is multiplied by
            ``gamma``.
        gamma: decay factor.
        warmup_iters: iterations of linear warm-up; 0 for none. At most a third of the iterations up
            to the first milestone: in a run on few images the full rate would not be reached.
        warmup_factor: multiplier at iteration 0 of the warm-up.
        epochs, max_iter: length of the run, for ``__call__`` only.
    """

    def __init__(
        self,
        *,
        milestones: Sequence[float] = (),
        gamma: float = 0.1,
        warmup_iters: int = 0,
        warmup_factor: float = 0.001,
        epochs: float | None = None,
        max_iter: int | None = None,
    ) -> None:
        self.milestones = sorted(milestones)
        self.gamma = gamma
        self.warmup_iters = warmup_iters
        self.warmup_factor = warmup_factor
        self.epochs = epochs
        self.max_iter = max_iter

    def __call__(self, where: float) -> float:
        """The multiplier after the fraction ``where`` of the run."""
        return self._unaided(where)

    @functools.cached_property
    def _unaided(self) -> ParamScheduler:
        if not self.max_iter or (self.milestones and not self.epochs):
            raise UserError(
                "lr_multiplier.milestones are epochs: pass train.max_iter=... and train.epochs=..., the "
                "same length twice, to a trainer that does not know the number of images"
            )
        epoch_iters = self.max_iter / self.epochs if self.epochs else math.nan
        return self.build(RunLength(self.max_iter, epoch_iters, 0, 0))

    def build(self, run: RunLength) -> ParamScheduler:
        """The schedule over this run, as fvcore's function of the fraction done."""
        if self.milestones and math.isnan(run.epoch_iters):
            raise UserError(
                "lr_multiplier.milestones are epochs, but the training loader does not tell how "
                "many images it has"
            )
        steps = [round(epoch * run.epoch_iters) for epoch in self.milestones]
        late = [epoch for epoch, step in zip(self.milestones, steps) if step >= run.max_iter]
        if late:
            logger.warning(
                "lr_multiplier.milestones=%s: %s lie behind the run's %.4g epochs: the learning rate "
                "does not drop there",
                self.milestones,
                late,
                run.max_iter / run.epoch_iters,
            )
        steps = [step for step in steps if step < run.max_iter]
        scheduler = MultiStepParamScheduler(
            [self.gamma**i for i in range(len(steps) + 1)],
            num_updates=run.max_iter,
            milestones=steps,
        )
        full_rate = min(steps, default=run.max_iter)
        warmup_iters = min(self.warmup_iters, full_rate // 3)
        if warmup_iters < self.warmup_iters:
            logger.warning(
                "lr_multiplier.warmup_iters=%d is too long for this run, whose learning rate falls "
                "or ends after %d iterations: the warm-up takes %d, a third of them",
                self.warmup_iters,
                full_rate,
                warmup_iters,
            )
        if warmup_iters:
            warmup_length = warmup_iters / run.max_iter
            scheduler = WarmupParamScheduler(scheduler, self.warmup_factor, warmup_length)
        return scheduler


def build_lr_multiplier(config: DictConfig, run: RunLength) -> ParamScheduler:
    """Builds ``lr_multiplier``: an ``EpochSchedule``, or any fvcore ParamScheduler."""
    schedule = instantiate(config)
    return schedule.build(run) if isinstance(schedule, EpochSchedule) else schedule
