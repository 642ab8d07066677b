"""Parameter groups, and the optimizer in the hands of detectron2's own trainer for LazyConfigs."""

import logging

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, hooks
from detectron2.solver import get_default_optimizer_params
from torch import nn

from sparse_detr.engine import AdamW, LRFactors, build_optimizer
from sparse_detr.errors import UserError

from .test_bad_days import TINY

# What detectron2's tools/lazyconfig_train_net.py must be told: it counts in iterations.
ITERATIONS = ("train.max_iter=4", "train.epochs=2", "train.eval_period=0", "train.checkpointer.period=100")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(2, 3)
        self.sampling_offsets = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)


def groups(weight_decay_norm):
    config = L(AdamW)(
        params=L(get_default_optimizer_params)(
            base_lr="${..lr}",
            weight_decay_norm=weight_decay_norm,
            lr_factor_func=L(LRFactors)(rules={"backbone": 0.1, "sampling_offsets": 0.5}),
        ),
        lr=1e-3,
        weight_decay=1e-4,
    )
    optimizer = build_optimizer(config, Model())
    assert "model" not in config.params  # the config stays printable and savable
    found = {}
    for group in optimizer.param_groups:
        key = (round(group["lr"], 9), group["weight_decay"])
        found[key] = found.get(key, 0) + sum(p.numel() for p in group["params"])
    return found


def test_learning_rates_and_decay_go_by_name_and_kind():
    assert groups(None) == {(1e-4, 1e-4): 9, (5e-4, 1e-4): 20, (1e-3, 1e-4): 10}
    assert groups(0.0) == {(1e-4, 1e-4): 9, (5e-4, 1e-4): 20, (1e-3, 0.0): 10}


def test_the_first_fitting_rule_decides():
    factors = LRFactors(rules={"backbone": 0.1, "offsets": 0.2})
    assert factors("backbone.offsets.weight") == 0.1
    assert factors("encoder.layers.0.offsets.bias") == 0.2
    assert factors("encoder.norm.weight") == 1.0


def tiny(tmp_path, *overrides):
    cfg = LazyConfig.load(str(TINY))  # as the script does: no check of ours in between
    return LazyConfig.apply_overrides(cfg, [f"data.root={tmp_path}/data", *ITERATIONS, *overrides])


def test_detectron2s_trainer_clips_and_follows_the_schedule(tmp_path):
    """The steps of its script, in its order."""
    cfg = tiny(tmp_path, "lr_multiplier.milestones=[1]", "train.device=auto")
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), optimizer)
    seen = []

    class Watch(hooks.HookBase):
        def after_step(self):
            gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            seen.append((torch.stack(gradients).norm().item(), optimizer.param_groups[0]["lr"]))

    trainer.register_hooks([Watch(), hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))])
    trainer.train(0, cfg.train.max_iter)
    norms, rates = zip(*seen)
    assert norms == pytest.approx([cfg.train.clip_grad.max_norm] * 4, rel=1e-3)
    assert rates == pytest.approx([rates[0], rates[0], rates[0] / 10, rates[0] / 10])


@pytest.mark.parametrize(
    "override",
    [
        "train.max_iter=null",
        "train.eval_period=null",
        "train.checkpointer.period=null",
        "train.model_ema.enabled=true",
        "train.grad_accumulation=2",
        "train.early_stop.patience=3",
    ],
)
def test_what_detectron2s_trainer_would_skip_is_refused(tmp_path, override):
    cfg = tiny(tmp_path, override)
    cfg.optimizer.params.model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=override.split("=")[0]):
        instantiate(cfg.optimizer)


def test_other_mixed_precision_is_refused_and_what_is_harmless_is_named(tmp_path, caplog):
    cfg = tiny(tmp_path, "train.amp.enabled=true")
    cfg.optimizer.params.model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="train.amp.dtype must be float16"):
        instantiate(cfg.optimizer)
    cfg.train.amp.dtype = "float16"
    with caplog.at_level(logging.WARNING):
        instantiate(cfg.optimizer)
    assert "leaves out: train.best_checkpoint" in caplog.text


def test_our_own_trainer_is_not_asked_twice(tmp_path):
    """It clips, and reads the rest of ``train``, by itself."""
    cfg = tiny(tmp_path, "train.max_iter=null", "train.model_ema.enabled=true")
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(cfg.optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(p.grad.eq(1).all() for p in model.parameters())
    assert cfg.optimizer.train is not None
