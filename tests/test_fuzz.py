"""Random inputs, from a fixed seed: the op against its reference, and the post-processing."""

import math

import numpy as np
import pytest
import torch

from sparse_detr.kernels import ms_deform_attn, reference
from sparse_detr.modeling.postprocess import detections, top_detections

CASES = 40


def random_case(seed, dtype=torch.float64):
    """Any number of levels, cells, heads, channels, points and queries, down to one or none."""
    random = np.random.default_rng(seed)
    shapes = [tuple(int(n) for n in random.integers(1, 9, 2)) for _ in range(random.integers(1, 5))]
    batch, heads, points = (int(n) for n in random.integers(1, 4, 3))
    channels, queries = int(random.integers(1, 20)), int(random.integers(0, 12))
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=dtype)

    value = draw(batch, sum(h * w for h, w in shapes), heads, channels)
    locations = 0.5 + draw(batch, queries, heads, len(shapes), points, 2)
    # on borders and cell centres, far away, and further than an integer reaches (but not exactly
    # one cell outside, where the slope has a step and either side of it would be right)
    special = torch.tensor([0.0, 1.0, 0.5, -0.3, 1e4, -1e4, 1e12, -1e30], dtype=dtype)
    chosen = torch.rand(locations.shape, generator=generator) < 0.25
    picks = torch.randint(len(special), locations.shape, generator=generator)
    locations = torch.where(chosen, special[picks], locations)
    weights = draw(batch, queries, heads, len(shapes), points)
    return value, shapes, locations, weights


def results(op, value, shapes, locations, weights):
    """The output and its three gradients."""
    inputs = [x.clone().requires_grad_() for x in (value, locations, weights)]
    out = op(inputs[0], shapes, *inputs[1:])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, grad, materialize_grads=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_the_op_equals_its_reference(dtype, tolerance):
    for seed in range(CASES):
        case = random_case(seed, dtype)
        found = results(ms_deform_attn, *case)
        expected = results(reference.ms_deform_attn, *case)
        for name, a, b in zip(("output", "value", "locations", "weights"), found, expected):
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda m, s=seed, n=name: f"{s}, {n}: {m}"
            )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["value", "locations", "weights"])
def test_what_is_not_finite_stays_with_its_query(where, bad):
    """No crash, no read outside of the maps, and nobody else's output changes."""
    value, shapes, locations, weights = random_case(3)
    assert locations.shape[1] > 2
    sound = ms_deform_attn(value, shapes, locations, weights)
    broken = {"value": value, "locations": locations, "weights": weights}
    broken[where] = broken[where].clone()
    broken[where][0, 0, 0] = bad
    out = ms_deform_attn(broken["value"], shapes, broken["locations"], broken["weights"])
    assert out.shape == sound.shape
    if where == "value":
        channels = value.shape[-1]  # other heads never read it
        torch.testing.assert_close(out[..., channels:], sound[..., channels:])
    else:
        torch.testing.assert_close(out[0, 1:], sound[0, 1:])
    torch.testing.assert_close(out[1:], sound[1:])


def test_detections_of_any_prediction():
    """Sorted scores, classes that exist, boxes of the query they name; scaled to the image."""
    for seed in range(CASES):
        random = np.random.default_rng(seed)
        batch, queries, classes = (int(n) for n in random.integers(1, 7, 3))
        k = int(random.integers(1, 50))
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, queries, classes, generator=generator) * 30
        boxes = torch.rand(batch, queries, 4, generator=generator) * 1.5 - 0.25
        scores, labels, corners = top_detections(logits, boxes, k)
        count = min(k, queries * classes)
        assert scores.shape == labels.shape == (batch, count)
        assert corners.shape == (batch, count, 4)
        assert (scores.diff(dim=1) <= 0).all() and ((labels >= 0) & (labels < classes)).all()
        best = logits.sigmoid().flatten(1).sort(dim=1, descending=True).values[:, :count]
        assert torch.equal(scores, best)

        sizes = [tuple(int(n) for n in random.integers(1, 500, 2)) for _ in range(batch)]
        for image, found in enumerate(detections(logits, boxes, sizes, k)):
            height, width = sizes[image]
            assert found.image_size == (height, width) and len(found) == count
            pixels = corners[image] * torch.tensor([width, height, width, height])
            torch.testing.assert_close(found.pred_boxes.tensor, pixels)
