"""Gradient accumulation: a batch computed in parts trains like the whole batch."""

import itertools

import pytest
import torch

from sparse_detr.data.loader import build_train_loader
from sparse_detr.engine import Trainer

from ..modeling.tiny import sample, tiny_model


def batch_of(objects, size=(48, 64)):
    """One image for each number of objects."""
    batch = [sample(*size, num_boxes=n, seed=seed) for seed, n in enumerate(objects)]
    for entry in batch:
        entry["image"] = entry["image"].double()
    return batch


def step(config, objects, parts, max_grad_norm=None):
    """Gradients and stored losses of one step in double precision."""
    model = tiny_model(config).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(
        model=model,
        data_loader=itertools.repeat(batch_of(objects)),
        optimizer=optimizer,
        max_grad_norm=max_grad_norm,
        grad_accumulation=parts,
        seed=0,
    )
    trainer.train(0, 1)
    losses = {k: v for k, (v, _) in trainer.storage.latest().items() if "loss" in k}
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, losses


@pytest.mark.parametrize(
    "config",
    [
        "deformable_detr/deformable_detr_r50_two_stage_50ep",
        "sparse_detr/sparse_detr_r50_30_50ep",
        "focus_detr/focus_deformable_detr_r50_50ep",
        "h_deformable_detr/h_deformable_detr_r50_12ep",
    ],
)
def test_parts_add_up_to_the_whole_batch(config):
    """Images of one size with 3, 0, 1 and 2 objects; one part holds a single object."""
    whole, losses = step(config, (3, 2, 0, 1), 1)
    for parts in (2, 4):
        gradients, found = step(config, (3, 2, 0, 1), parts)
        assert gradients.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-11)
        assert found == pytest.approx(losses, rel=1e-6)  # float32, for the log


def test_a_batch_with_fewer_objects_than_parts():
    whole, _ = step("deformable_detr/deformable_detr_r50_50ep", (0, 0, 1, 0), 1)
    parts, _ = step("deformable_detr/deformable_detr_r50_50ep", (0, 0, 1, 0), 4)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-11)


def test_the_sum_is_clipped_not_the_parts():
    gradients, _ = step("deformable_detr/deformable_detr_r50_50ep", (3, 2), 2, max_grad_norm=0.1)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    torch.testing.assert_close(norm.item(), 0.1, rtol=1e-4, atol=0)


def test_parts_must_be_equal():
    """Said before the first step where the loader tells its batch size."""
    loader = build_train_loader(dataset=[{}] * 8, mapper=dict, total_batch_size=4, num_workers=0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model=model, data_loader=loader, optimizer=optimizer, grad_accumulation=3)
    with pytest.raises(ValueError, match="grad_accumulation=3 must divide the 4 images"):
        trainer.train(0, 1)
    with pytest.raises(ValueError, match="grad_accumulation=0 must be at least 1"):
        Trainer(model=model, data_loader=loader, optimizer=optimizer, grad_accumulation=0)
