"""The optimizer: groups of parameters, and what a trainer that is not this package's leaves undone."""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch.nn.utils import clip_grad_norm_

from ..errors import UserError

logger = logging.getLogger(__name__)


class AdamW(torch.optim.AdamW):
    """torch's, also in the hands of a trainer that reads a part of the config's ``train`` section.

    Such a trainer (detectron2's ``tools/lazyconfig_train_net.py``) builds the optimizer straight from
    the config, which hands it ``train``. Gradients are then clipped in ``step``, and what cannot be done
    here is refused. ``build_optimizer``, for this package's trainer, passes no ``train``.

    Args:
        params: parameters, or groups of them.
        train: the config's section; None: the trainer follows it.
        options: torch's.

    Raises:
        UserError: ``train`` asks for what the trainer would leave out, or is silent on what it needs.
    """

    def __init__(self, params: Iterable, *, train: DictConfig | None = None, **options) -> None:
        if train is not None:
            _check_unaided(train)
        super().__init__(params, **options)
        if train is not None and train.clip_grad.enabled:
            clip_in_step(self, train.clip_grad.max_norm)


def _check_unaided(train: DictConfig) -> None:
    """What detectron2's trainer for LazyConfigs would do otherwise than ``train`` says."""
    wrong = [
        f"train.{key} {why}"
        for key, asked, why in (
            ("max_iter", train.max_iter is None, "must be a number: it knows no epochs"),
            ("eval_period", train.eval_period is None, "must be a number of iterations, or 0"),
            ("checkpointer.period", train.checkpointer.period is None, "must be a number of iterations"),
            ("model_ema.enabled", train.model_ema.enabled, "must be false: it has no moving average"),
            ("grad_accumulation", train.grad_accumulation != 1, "must be 1: it takes whole batches"),
            ("early_stop.patience", train.early_stop.patience is not None, "must be null: it never stops"),
            (
                "amp.dtype",
                train.amp.enabled and train.amp.dtype != "float16",
                "must be float16: it knows no other",
            ),
        )
        if asked
    ]
    if wrong:
        raise UserError(
            "the trainer is not this project's, which reads all of the config (train_net.py). For the "
            f"one in use: {'; '.join(wrong)}"
        )
    left_out = [key for key in ("best_checkpoint", "wandb") if train[key].enabled]
    if left_out:
        logger.warning("a trainer that is not this project's leaves out: train.%s", ", train.".join(left_out))


def clip_in_step(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0) -> None:
    """Lets ``optimizer.step`` clip the norm of all gradients together, whoever calls it."""

    def clip(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)


class LRFactors:
    """Learning-rate factor of a parameter by its name: detectron2's ``lr_factor_func``.

    Args:
        rules: part of a dotted parameter name -> factor. The first rule that fits decides; without
            one it is 1.
    """

    def __init__(self, *, rules: Mapping[str, float]) -> None:
        self.rules = dict(rules)

    def __call__(self, name: str) -> float:
        return next((factor for part, factor in self.rules.items() if part in name), 1.0)


def build_optimizer(config: DictConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Builds ``optimizer`` for this package's trainer; ``config.params.model`` is filled in here."""
    config = copy.deepcopy(config)
    config.params.model = model
    if "train" in config:
        config.train = None
    optimizer = instantiate(config)
    groups: Counter[tuple[float, float]] = Counter()
    for group in optimizer.param_groups:
        groups[group["lr"], group["weight_decay"]] += sum(p.numel() for p in group["params"])
    for (lr, weight_decay), count in sorted(groups.items(), reverse=True):
        logger.info("%12s parameters: lr %g, weight decay %g", f"{count:,}", lr, weight_decay)
    return optimizer
