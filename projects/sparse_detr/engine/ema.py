"""An exponential moving average of the weights: what is evaluated, and usually a little better."""

import math
from collections.abc import Sequence

import torch
from detectron2.engine import HookBase
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import UserError


class ModelEMA(HookBase):
    """Moves ``average`` a little towards the model after every step.

    The decay grows with the number n of steps, ``decay * (1 - exp(-n / warmup))``, so that the
    random initial weights are soon forgotten. Weights and buffers are averaged alike.

    Args:
        model: the model that is trained, not wrapped for data parallelism.
        decay: in [0, 1); the average reaches back over about 1 / (1 - decay) steps.
        warmup: steps after which the decay has come to 63 % of its value; 0: at once.

    Attributes:
        average: AveragedModel; ``average.module`` is the model with the averaged weights, in eval
            mode.
    """

    def __init__(self, model: torch.nn.Module, *, decay: float = 0.9997, warmup: int = 2000) -> None:
        if not 0 <= decay < 1 or warmup < 0:
            raise UserError(
                f"train.model_ema: decay={decay} must lie in [0, 1), warmup={warmup} must be at "
                "least 0; decay=0.9997 and warmup=2000 are good values for long runs"
            )
        self.decay = decay
        self.warmup = warmup
        self._model = model
        self.average = AveragedModel(model, multi_avg_fn=self._update, use_buffers=True)
        self.average.requires_grad_(False).eval()

    def after_step(self) -> None:
        self.average.update_parameters(self._model)

    def _update(
        self, averages: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], _: torch.Tensor | int
    ) -> None:
        updates = self.average.n_averaged.item()  # on the CPU, unlike the argument
        grown = 1 - math.exp(-updates / self.warmup) if self.warmup else 1.0
        get_ema_multi_avg_fn(self.decay * grown)(averages, weights, updates)
