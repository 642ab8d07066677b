"""Whole models on the device that runs them, beside the same in float64 on the CPU. Where there is a GPU this
is the proof of the whole there; the same tests on the CPU prove the tests.
"""

import copy

import pytest
import torch

from ..kernels.test_device import gpu
from .tiny import METHODS, reveal, sample, tiny_model


@pytest.fixture(autouse=True)
def no_short_mantissas(monkeypatch):
    """Convolutions of a GPU take tf32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


devices = pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
BATCH = [sample(70, 90, seed=1), sample(64, 120, num_boxes=3, seed=2)]


def model_of(config):
    """Without sampling points on the lines where slopes jump: they start at whole cells from cell centres."""
    model = reveal(tiny_model(config))
    for module in model.modules():
        if hasattr(module, "sampling_offsets"):
            module.sampling_offsets.bias.data += torch.randn_like(module.sampling_offsets.bias) * 0.3
    return model


def step(model, device, dtype=torch.float64, autocast=None, scale=1.0):
    """Losses of a training step in ``dtype`` on ``device``, and the gradients of ``scale`` times their sum."""
    model = copy.deepcopy(model).to(device, dtype).train()
    with torch.autocast(device, autocast, enabled=autocast is not None):
        losses = model(BATCH)
    (sum(losses.values()) * scale).backward()
    gradients = {n: p.grad.double().cpu() / scale for n, p in model.named_parameters() if p.grad is not None}
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


def distance(found, exact):
    """Relative, of all gradients together."""
    assert found.keys() == exact.keys()
    difference = sum((found[n] - exact[n]).square().sum() for n in exact)
    return float((difference / sum(g.square().sum() for g in exact.values())).sqrt())


@pytest.fixture(scope="module")
def made():
    """Per config a model and its training step in float64 on the CPU. Noise is drawn on the device, and with
    other numbers on each: so without denoising."""
    found = {}

    def make(config):
        if config not in found:
            model = model_of(config)
            model.transformer.denoising = None
            found[config] = (model, *step(model, "cpu"))
        return found[config]

    return make


@devices
@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)], ids=str)
def test_losses_and_gradients(config, device, dtype, tolerance, made):
    model, exact, exact_gradients = made(config)
    losses, gradients = step(model, device, dtype)
    assert losses == pytest.approx(exact, rel=tolerance)
    assert distance(gradients, exact_gradients) < tolerance


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize(
    ("device", "dtype", "scale"),
    [("cpu", torch.bfloat16, 1.0), gpu("cuda", torch.bfloat16, 1.0), gpu("cuda", torch.float16, 64.0)],
    ids=str,
)
def test_mixed_precision(config, device, dtype, scale, made):
    """Near float64: a few tokens and matches may be other ones."""
    model, exact, exact_gradients = made(config)
    losses, gradients = step(model, device, torch.float32, dtype, scale)
    assert sum(losses.values()) == pytest.approx(sum(exact.values()), rel=0.2)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert distance(gradients, exact_gradients) < 0.8


@devices
@pytest.mark.parametrize("config", [c for c in METHODS if "deformable" not in c and "sparse" not in c])
def test_denoising(config, device):
    model = model_of(config)
    assert model.transformer.denoising is not None
    losses, gradients = step(model, device, torch.float32)
    assert any("dn" in name for name in losses) and all(g.isfinite().all() for g in gradients.values())


@devices
@pytest.mark.parametrize("config", METHODS)
def test_detections(config, device):
    model = model_of(config).eval()
    images = [{k: v for k, v in entry.items() if k != "instances"} for entry in BATCH]
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(images)
        found = model.to(device)(images)
    for one, other in zip(found, exact):
        one, other = one["instances"].to("cpu"), other["instances"]
        torch.testing.assert_close(one.scores, other.scores.float(), atol=1e-4, rtol=0)
        assert len(one) == len(other) > 0 and torch.equal(one.pred_classes, other.pred_classes)
        boxes = other.pred_boxes.tensor.float()
        torch.testing.assert_close(one.pred_boxes.tensor, boxes, atol=1e-2, rtol=0)
