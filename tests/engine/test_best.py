"""The best checkpoint, early stopping, and the moving average of the weights."""

import itertools
import json
import math

import pytest
import torch
from detectron2.engine import hooks
from torch import nn

from sparse_detr.engine import BestCheckpoint, Checkpointer, ModelEMA, Trainer


class Toy(nn.Module):
    """Its weight falls by one every step with SGD of learning rate 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, batch):
        self.steps += 1
        return {"loss": self.weight * 1.0}


def toy_trainer(model=None):
    model = model or Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Trainer(
        model=model,
        data_loader=itertools.repeat([{}]),
        optimizer=optimizer,
        max_grad_norm=None,
        seed=0,
    )


def run(folder, values, start=0, patience=None, **kwargs):
    """Ten iterations, evaluated after every second one with these results."""
    trainer = toy_trainer()
    results = iter(values)
    trainer.model.weight.data -= start
    best = BestCheckpoint(2, Checkpointer(trainer.model, str(folder)), patience=patience, **kwargs)
    evaluate = hooks.EvalHook(2, lambda: {"bbox": {"AP": next(results)}})
    trainer.register_hooks([evaluate, best])
    trainer.train(start, 10)
    return trainer, best


def best_weight(folder):
    return torch.load(folder / "model_best.pth", weights_only=True)["model"]["weight"].item()


def test_the_best_weights_are_kept(tmp_path):
    trainer, best = run(tmp_path, [1.0, math.nan, 3.0, 2.0, 3.0])
    assert best_weight(tmp_path) == -6  # after six steps; an equal result later is no better one
    assert not trainer.stopped and best.stale == 2
    rows = json.loads((tmp_path / "evaluations.json").read_text())
    assert [row["iteration"] for row in rows] == [2, 4, 6, 8, 10]
    assert rows[2]["bbox/AP"] == 3.0
    assert not (tmp_path / "last_checkpoint").exists()  # no run can go on from it


def test_less_may_be_better(tmp_path):
    run(tmp_path, [3.0, 1.0, 2.0, 2.0, 2.0], mode="min")
    assert best_weight(tmp_path) == -4


def test_a_run_that_improves_no_more_is_stopped(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer, best = run(tmp_path, [1.0, 3.0, 2.0, 2.5], patience=2)
    assert trainer.stopped and trainer.model.steps == 8 and best_weight(tmp_path) == -4
    assert (
        "training stops after 8 of 10 iterations: bbox/AP has not improved in the last 2 "
        "evaluations; the best, 3 after 4 iterations, is in model_best.pth"
    ) in caplog.text
    assert "Exception" not in caplog.text


@pytest.mark.parametrize("start", [4, 5, 6])
def test_counting_goes_on_after_a_resume(tmp_path, start):
    """As if uninterrupted, from whichever iteration."""
    with pytest.raises(StopIteration):
        run(tmp_path, [1.0, 3.0, 2.0])
    trainer, _ = run(tmp_path, [2.0, 2.5][start // 6 :], start=start, patience=2)
    assert trainer.stopped and trainer.model.steps + start == 8
    assert best_weight(tmp_path) == -4
    again, _ = run(tmp_path, [], start=8, patience=2)
    assert again.stopped and again.model.steps == 0
    more, _ = run(tmp_path, [9.0], start=8, patience=3)
    assert not more.stopped and best_weight(tmp_path) == -10
    fresh, _ = run(tmp_path, [0.5] * 5)  # killed before its first checkpoint: from the start
    assert best_weight(tmp_path) == -2


def test_evaluations_after_the_checkpoint_are_forgotten(tmp_path):
    """Resumed after four steps with another learning rate, say: the result at six is void."""
    with pytest.raises(StopIteration):
        run(tmp_path, [1.0, 3.0, 9.0])
    run(tmp_path, [2.0, 5.0, 4.0], start=4)
    assert best_weight(tmp_path) == -8


def test_settings_that_cannot_work_are_refused(tmp_path):
    checkpointer = Checkpointer(Toy(), str(tmp_path))
    with pytest.raises(ValueError, match="patience=0 must be at least 1"):
        BestCheckpoint(2, checkpointer, patience=0)
    with pytest.raises(ValueError, match="train.eval_period=0 evaluates only at the end"):
        BestCheckpoint(0, checkpointer, patience=3)
    with pytest.raises(ValueError, match="must be max or min, not 'most'"):
        BestCheckpoint(2, checkpointer, mode="most")
    with pytest.raises(ValueError, match="metric=bbox/APP is not among the results: bbox/AP"):
        run(tmp_path, [1.0], metric="bbox/APP", patience=3)
    with pytest.raises(ValueError, match=r"decay=1.0 must lie in \[0, 1\)"):
        ModelEMA(Toy(), decay=1.0)


def test_without_the_metric_a_run_goes_on_and_says_that_nothing_is_kept(tmp_path, caplog):
    trainer, _ = run(tmp_path, [1.0] * 5, metric="mine/AP")
    assert trainer.iter == 10 and not (tmp_path / "model_best.pth").exists()
    assert "metric=mine/AP is not among the results: bbox/AP" in caplog.text


def averaged(steps, **kwargs):
    trainer = toy_trainer()
    ema = ModelEMA(trainer.model, **kwargs)
    trainer.register_hooks([ema])
    trainer.train(0, steps)
    return ema.average.module.weight.item()


def test_the_average_follows_its_formula():
    """Weights after the steps are -1, -2, -3; the first is copied."""
    assert averaged(1, decay=0.5, warmup=0) == -1
    assert averaged(3, decay=0.5, warmup=0) == pytest.approx(-(0.25 + 0.5 + 1.5))
    first, second = (0.5 * (1 - math.exp(-n / 4)) for n in (1, 2))
    expected = second * (first * -1 + (1 - first) * -2) + (1 - second) * -3
    assert averaged(3, decay=0.5, warmup=4) == pytest.approx(expected)


def test_whoever_loads_weights_alone_gets_the_average(tmp_path):
    trainer = toy_trainer()
    ema = ModelEMA(trainer.model, decay=0.5, warmup=0)
    trainer.register_hooks([ema])
    trainer.train(0, 3)
    parts = dict(trainer=trainer, model_ema=ema.average)
    Checkpointer(trainer.model, str(tmp_path), **parts).save("model_0000002")

    path = str(tmp_path / "model_0000002.pth")
    model = Toy()
    Checkpointer(model).load(path)
    assert model.weight.item() == -2.25
    model = Toy()
    Checkpointer(model, trainer=toy_trainer()).load(path)  # to go on, now without an average
    assert model.weight.item() == -3
    other = ModelEMA(model, decay=0.5, warmup=0)
    Checkpointer(model, trainer=toy_trainer(), model_ema=other.average).load(path)
    assert model.weight.item() == -3 and other.average.module.weight.item() == -2.25
    assert other.average.n_averaged == 3
