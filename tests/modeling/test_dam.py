"""The decoder attention map as a target: against loops that follow the paper's words."""

import math

import torch
import torch.nn.functional as F

from sparse_detr.kernels import attention_map_splat
from sparse_detr.modeling.encoders.dam import (
    attention_map_target,
    correspondence,
    scoring_loss,
)
from sparse_detr.modeling.tokens import level_starts

SHAPES = ((5, 7), (3, 4), (1, 2))
NUM_TOKENS = sum(h * w for h, w in SHAPES)


def samples(batch=2, queries=4, heads=2, points=2, layers=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (layers, batch, queries, heads, len(SHAPES), points)
    locations = torch.rand(*size, 2, generator=generator, dtype=torch.double) * 1.3 - 0.15
    weights = torch.rand(size, generator=generator, dtype=torch.double)
    return list(locations), list(weights / weights.sum((-1, -2), keepdim=True))


def test_the_map_is_what_a_loop_over_all_samples_collects():
    locations, weights = samples()
    starts = level_starts(SHAPES)
    wanted = torch.zeros(2, NUM_TOKENS, dtype=torch.double)
    for layer_locations, layer_weights in zip(locations, weights, strict=True):
        for index in torch.cartesian_prod(*map(torch.arange, layer_weights.shape)).tolist():
            image, _, _, level, _ = index
            x, y = layer_locations[tuple(index)].tolist()
            weight = float(layer_weights[tuple(index)])
            height, width = SHAPES[level]
            left, top = math.floor(x * width), math.floor(y * height)
            dx, dy = x * width - left, y * height - top
            for row, column, share in (
                (top, left, (1 - dx) * (1 - dy)),
                (top, left + 1, dx * (1 - dy)),
                (top + 1, left, (1 - dx) * dy),
                (top + 1, left + 1, dx * dy),
            ):
                if 0 <= row < height and 0 <= column < width:
                    wanted[image, starts[level] + row * width + column] += weight * share
    found = attention_map_splat(locations, weights, SHAPES)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    assert found.sum() < sum(w.sum() for w in weights)  # what falls outside is lost


def test_the_target_marks_each_images_budget_of_its_best_valid_tokens():
    attention_map = torch.tensor([[0.0, 5.0, 3.0, 4.0, 1.0], [9.0, 1.0, 0.5, 0.0, 0.2]])
    mask = torch.tensor([[False] * 5, [True, False, False, True, False]])
    owned = torch.tensor([[True, True, True], [True, True, False]])
    target = attention_map_target(attention_map, mask, owned)
    assert target.tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]]


def test_a_budget_beyond_the_tokens_the_decoder_saw_stays_within_the_image():
    mask = torch.tensor([[False, False, True, True]])
    target = attention_map_target(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), mask, torch.ones(1, 2) > 0)
    assert target.tolist() == [[1, 1, 0, 0]]


def test_the_loss_is_the_multi_label_soft_margin_over_all_or_only_valid_tokens():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 6, generator=generator)
    target = (torch.rand(2, 6, generator=generator) > 0.5).float()
    torch.testing.assert_close(scoring_loss(scores, target), F.multilabel_soft_margin_loss(scores, target))
    mask = torch.tensor([[False] * 6, [False, False, True, True, True, True]])
    wanted = (
        F.multilabel_soft_margin_loss(scores[:1], target[:1])
        + F.multilabel_soft_margin_loss(scores[1:, :2], target[1:, :2])
    ) / 2
    torch.testing.assert_close(scoring_loss(scores, target, mask), wanted)


def test_correspondence_is_the_share_of_attention_on_the_selected_tokens():
    shapes = ((1, 3), (1, 2), (1, 1))
    attention_map = torch.tensor([[2.0, 1.0, 1.0, 3.0, 1.0, 0.0], [1.0, 1.0, 2.0, 0.0, 4.0, 0.0]])
    selected = torch.tensor([[0, 3], [4, 2]])
    shares = correspondence(attention_map, selected, shapes)
    wanted = {"all": (5 / 8 + 6 / 8) / 2, "0": (2 / 4 + 2 / 4) / 2, "1": (3 / 4 + 1) / 2, "2": 0.0}
    assert {k: float(v) for k, v in shares.items()} == wanted
