"""The training step: clipping, mixed precision, and the finite-loss guard."""

import itertools
import logging
import math

import pytest
import torch
from torch import nn

from sparse_detr.engine import Trainer
from sparse_detr.engine.trainer import amp_dtype

from ..modeling.tiny import sample, tiny_model


class Toy(nn.Module):
    """Two losses that are linear in the weight, so that gradients are known."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1, bias=False)
        nn.init.ones_(self.linear.weight)
        self.seen = []

    def forward(self, batch):
        x = torch.stack([entry["x"] for entry in batch])
        y = self.linear(x)
        self.seen.append((y.dtype, torch.rand(()).item()))
        return {"loss_a": 3 * y.float().mean(), "loss_b": y.float().sum() * 0}


def entry(value=1.0, image_id=1):
    return {"x": torch.full((4,), value), "image_id": image_id, "file_name": f"{image_id}.jpg"}


def trained(batches, iterations=1, lr=1.0, **kwargs):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    kwargs = {"seed": 0, **kwargs}
    trainer = Trainer(model=model, data_loader=itertools.cycle(batches), optimizer=optimizer, **kwargs)
    trainer.train(0, iterations)
    return model, trainer


def test_gradients_are_clipped_to_their_global_norm():
    """The gradient is (3, 3, 3, 3), of norm 6."""
    model, trainer = trained([[entry()]], max_grad_norm=0.1)
    assert torch.allclose(model.linear.weight, torch.full((1, 4), 1 - 0.05))
    assert trainer.storage.latest()["grad_norm"][0] == pytest.approx(6.0)  # before clipping
    model, _ = trained([[entry()]], max_grad_norm=None)
    assert torch.allclose(model.linear.weight, torch.full((1, 4), 1 - 3.0))


def test_losses_are_stored_by_name():
    _, trainer = trained([[entry()]])
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert latest["loss_a"] == latest["total_loss"] == 12 and latest["loss_b"] == 0
    assert latest["data_time"] >= 0


def test_bfloat16_runs_on_the_cpu():
    model, _ = trained([[entry()]], amp=torch.bfloat16)
    assert model.seen[0][0] == torch.bfloat16
    assert model.linear.weight.dtype == torch.float32
    model, _ = trained([[entry()]])
    assert model.seen[0][0] == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 training needs a GPU")
def test_float16_scales_the_loss_and_unscales_before_clipping():
    model = Toy().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = [{**entry(), "x": torch.ones(4, device="cuda")}]
    trainer = Trainer(
        model=model,
        data_loader=itertools.repeat(batch),
        optimizer=optimizer,
        amp=torch.float16,
        max_grad_norm=0.1,
        seed=0,
    )
    trainer.train(0, 1)
    assert torch.allclose(model.linear.weight, torch.full((1, 4), 0.95, device="cuda"), atol=1e-3)


def test_amp_settings_are_checked():
    cpu = torch.device("cpu")
    assert amp_dtype(False, "float16", cpu) is None
    assert amp_dtype(True, "bfloat16", cpu) == torch.bfloat16
    assert amp_dtype(True, "float16", torch.device("cuda")) == torch.float16
    with pytest.raises(ValueError, match="float16 needs a GPU.*use bfloat16"):
        amp_dtype(True, "float16", cpu)
    with pytest.raises(ValueError, match="must be bfloat16 or float16, not 'int8'"):
        amp_dtype(True, "int8", cpu)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(value, caplog):
    caplog.set_level(logging.CRITICAL)  # the expected traceback need not fill the log
    good, bad = [entry(image_id=3)], [entry(image_id=4), entry(value, image_id=5)]
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model=model, data_loader=iter([good, bad]), optimizer=optimizer, seed=0)
    with pytest.raises(FloatingPointError) as error:
        trainer.train(0, 2)
    message = str(error.value)
    assert "iteration 1, before the weights were changed" in message
    assert "loss_a = " in message
    assert "4 (4.jpg), 5 (5.jpg)" in message and "3.jpg" not in message
    assert torch.allclose(model.linear.weight, torch.full((1, 4), 0.95))  # one step, the good one


def test_a_gradient_that_is_not_finite_stops_too():
    class Root(Toy):
        def forward(self, batch):
            return {"loss_a": (super().forward(batch)["loss_a"] * 0).sqrt()}  # 0, with slope inf

    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model=model, data_loader=iter([[entry()]]), optimizer=optimizer, seed=0)
    with pytest.raises(FloatingPointError, match="grad_norm = nan\n  images: 1 .1.jpg."):
        trainer.train(0, 1)
    assert torch.equal(model.linear.weight, torch.ones(1, 4))


def test_randomness_in_the_model_depends_on_the_iteration_alone():
    draws = [draw for _, draw in trained([[entry()]], 4)[0].seen]
    assert len(set(draws)) == 4
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model=model, data_loader=itertools.repeat([entry()]), optimizer=optimizer, seed=0)
    trainer.train(2, 4)
    assert [draw for _, draw in model.seen] == draws[2:]


def test_a_drawn_seed_is_kept_by_checkpoints():
    _, first = trained([[entry()]], seed=None)
    _, second = trained([[entry()]], seed=None)
    assert first.seed != second.seed
    second.load_state_dict(first.state_dict())
    assert first.seed == second.seed


def resumed(state, **settings):
    """A trainer with the optimizer's ``settings``, after it has loaded ``state``."""
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 1.0, **settings})
    trainer = Trainer(model=model, data_loader=itertools.repeat([entry()]), optimizer=optimizer, seed=1)
    trainer.load_state_dict(state)
    return trainer


def test_a_resumed_run_takes_the_optimizers_settings_from_the_config(caplog):
    state = trained([[entry()]])[1].state_dict()
    state["optimizer"]["param_groups"][0].update(lr=0.1, initial_lr=1.0)  # a schedule's
    group = resumed(state).optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"]) == (0.1, 1.0)
    assert "other settings" not in caplog.text
    assert "goes on with its own seed 0, not with train.seed=1" in caplog.text
    group = resumed(state, lr=0.5, weight_decay=0.25).optimizer.param_groups[0]
    assert (group["initial_lr"], group["weight_decay"]) == (0.5, 0.25)
    assert "other settings of the optimizer: lr 1.0 -> 0.5, weight_decay 0 -> 0.25" in caplog.text


def test_another_optimizer_cannot_resume():
    state = trained([[entry()]])[1].state_dict()
    state["optimizer"]["param_groups"] *= 2
    with pytest.raises(ValueError, match="different number of parameter groups.*must be as before"):
        resumed(state)
    state = trained([[entry()]])[1].state_dict()
    model = Toy()
    trainer = Trainer(model=model, data_loader=[], optimizer=torch.optim.AdamW(model.parameters()), seed=0)
    with pytest.raises(ValueError, match=r"\(it had no .*betas.*optimizer._target_"):
        trainer.load_state_dict(state)


def test_a_broken_image_and_broken_weights_are_pointed_out():
    def stopped(model, batch):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer = Trainer(model=model, data_loader=iter([batch]), optimizer=optimizer, seed=0)
        with pytest.raises(FloatingPointError) as error:
            trainer.train(0, 1)
        return str(error.value)

    sound, broken = (sample(48, 64, seed=seed) for seed in (1, 2))
    broken["image"][0, 3, 5] = math.nan
    message = stopped(tiny_model(), [sound, broken])
    assert "images: None (image1.jpg), None (image2.jpg)" in message
    assert "the pixels of None (image2.jpg) are not finite" in message and "of the weights" not in message

    model = tiny_model()
    with torch.no_grad():
        model.transformer.level_embed[1, 2] = math.inf
    message = stopped(model, [sound, sample(48, 64, seed=3)])
    assert "1 of the weights are not finite themselves: transformer.level_embed" in message
    assert "the pixels" not in message
