"""Epochs to iterations and learning-rate schedules."""

import logging
import math

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from fvcore.common.param_scheduler import CosineParamScheduler, ParamScheduler
from omegaconf import OmegaConf

from sparse_detr.engine import EpochSchedule, RunLength, build_lr_multiplier
from sparse_detr.errors import UserError


def train_section(**kwargs):
    base = dict(epochs=None, max_iter=None, eval_period=None, checkpointer=dict(period=None))
    return OmegaConf.create({**base, **kwargs})


def test_epochs_follow_the_data_and_the_batch():
    run = RunLength.from_config(train_section(epochs=12), 118287, 16)
    assert run.max_iter == 88716  # ceil(12 * 118287 / 16)
    assert run.eval_period == run.checkpoint_period == 7393
    assert RunLength.from_config(train_section(epochs=12), 118287, 32).max_iter == 44358


def test_iterations_win_over_epochs():
    train = train_section(epochs=12, max_iter=100, eval_period=0, checkpointer=dict(period=30))
    run = RunLength.from_config(train, 1000, 10)
    assert (run.max_iter, run.eval_period, run.checkpoint_period) == (100, 0, 30)


def test_a_loader_of_unknown_length_needs_iterations():
    with pytest.raises(ValueError, match="pass train.max_iter="):
        RunLength.from_config(train_section(epochs=12), None, None)
    run = RunLength.from_config(train_section(max_iter=50), None, None)
    assert run.max_iter == run.eval_period == 50 and math.isnan(run.epoch_iters)
    with pytest.raises(ValueError, match="milestones are epochs"):
        EpochSchedule(milestones=[1]).build(run)


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ValueError, match="train.epochs or train.max_iter"):
        RunLength.from_config(train_section(), 10, 1)


@pytest.mark.parametrize("key", ["max_iter", "epochs"])
def test_nothing_is_no_length(key):
    """``max_iter=0`` does not stand for the epochs."""
    train = train_section(**{"epochs": 12, key: 0})
    with pytest.raises(ValueError, match=f"train.{key}=0 must be above 0, or null"):
        RunLength.from_config(train, 1000, 10)


@pytest.mark.parametrize(("images", "period"), [(17, 204), (200, 200), (120, 240), (7393, 7393)])
def test_checkpoints_of_short_epochs_are_some_hundred_iterations_apart(images, period):
    run = RunLength.from_config(train_section(epochs=100), images, 1)
    assert (run.eval_period, run.checkpoint_period) == (images, period)


RUN = RunLength(max_iter=120, epoch_iters=10.0, eval_period=0, checkpoint_period=10)


def test_milestones_are_epochs():
    schedule = EpochSchedule(milestones=[8, 11, 40], gamma=0.1).build(RUN)
    lr = [schedule(i / 120) for i in range(120)]
    assert lr[:80] == [1.0] * 80
    assert lr[80:110] == pytest.approx([0.1] * 30)
    assert lr[110:] == pytest.approx([0.01] * 10)


def test_milestones_behind_the_end_are_noticed(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sparse_detr"), "propagate", True)  # a run may have changed it
    EpochSchedule(milestones=[8, 11]).build(RUN)
    assert not caplog.records
    EpochSchedule(milestones=[8, 12, 40]).build(RUN)
    assert "milestones=[8, 12, 40]: [12, 40] lie behind the run's 12 epochs" in caplog.text


def test_warm_up_is_linear_in_iterations():
    schedule = EpochSchedule(milestones=[8], warmup_iters=12, warmup_factor=0.1).build(RUN)
    lr = [schedule(i / 120) for i in range(120)]
    assert lr[0] == pytest.approx(0.1) and lr[6] == pytest.approx(0.55) and lr[12] == 1.0
    assert lr[79] == 1.0 and lr[80] == pytest.approx(0.1)


def test_warm_up_leaves_most_of_a_short_run_at_the_full_rate(caplog):
    """200 iterations of the shipped recipe on a set of which an epoch is two iterations."""
    run = RunLength(max_iter=48, epoch_iters=2, eval_period=2, checkpoint_period=2)
    schedule = EpochSchedule(milestones=[20], warmup_iters=200).build(run)
    lr = [schedule(i / 48) for i in range(48)]
    assert lr[:14] == pytest.approx([0.001 + 0.999 * i / 13 for i in range(14)])
    assert lr[14:40] == [1.0] * 26 and lr[40:] == pytest.approx([0.1] * 8)
    assert "warmup_iters=200 is too long" in caplog.text and "takes 13, a third" in caplog.text
    schedule = EpochSchedule(warmup_iters=9).build(run)
    assert [schedule(i / 48) for i in (0, 9, 47)] == [0.001, 1.0, 1.0]


def test_plain_schedulers_pass_through():
    config = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
    assert build_lr_multiplier(config, RUN)(0.5) == pytest.approx(0.5)


def test_a_trainer_that_knows_no_epochs_gets_the_same_schedule():
    """``max_iter`` counts as ``epochs`` epochs: detectron2's ``LRScheduler`` calls what the config builds."""
    config = L(EpochSchedule)(milestones=[8], warmup_iters=12, warmup_factor=0.1, epochs=12, max_iter=120)
    unaided, built = instantiate(config), build_lr_multiplier(config, RUN)
    assert isinstance(unaided, ParamScheduler)
    assert [unaided(i / 120) for i in range(120)] == [built(i / 120) for i in range(120)]


@pytest.mark.parametrize("missing", ["epochs", "max_iter"])
def test_a_trainer_that_knows_no_epochs_must_be_told_them(missing):
    schedule = EpochSchedule(milestones=[8], **{"epochs": 12, "max_iter": 120, missing: None})
    with pytest.raises(UserError, match=r"pass train.max_iter=\.\.\. and train.epochs="):
        schedule(0.0)
