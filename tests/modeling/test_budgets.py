"""Token budgets of their own: an image keeps what its scores ask for, a set of images what was asked for."""

import copy
import pickle

import pytest
import torch
from detectron2.config import instantiate

from sparse_detr import export
from sparse_detr.analysis import analyze
from sparse_detr.calibrate import token_rankings
from sparse_detr.config import get_config
from sparse_detr.errors import UserError
from sparse_detr.modeling import MeanRatio
from sparse_detr.overlays import recorded_output

from .test_composition import composed
from .test_exact_sizes import assert_alone_as_in_a_batch, exact, images
from .tiny import reveal, sample, shrink, tiny_model

SPARSE, FOCUS = "sparse_detr/sparse_detr_r50_30_50ep", "focus_detr/focus_detr_r50_4scale_12ep"


def rankings(count=20, seed=0):
    """Of images of 50 to 150 tokens, easy ones and crowds."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(50 + 5 * image, generator=generator) + torch.randn(1, generator=generator)
        for image in range(count)
    ]


def counts(rule, images):
    return torch.tensor([int(rule.counts(r[None], torch.ones(1, len(r), dtype=torch.bool))) for r in images])


@pytest.mark.parametrize("mean", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("bounds", [{}, {"low": 0.0, "high": 1.0}])
def test_calibrated_images_keep_the_mean_together(mean, bounds):
    rule = MeanRatio.calibrate(rankings(), mean, **bounds)
    kept, total = counts(rule, rankings()), torch.tensor([len(r) for r in rankings()])
    assert rule == mean and 0 <= mean * total.sum() - kept.sum() <= 1
    assert kept.min() >= 1 and (kept >= (rule.low * total).long()).all() and (kept <= rule.high * total).all()
    assert (kept / total).std() > 0.01


def test_an_image_keeps_the_tokens_above_the_threshold_between_bounds():
    ranking = torch.tensor([[0.9, 0.1, 0.8, 0.7, 2.0], [0.9, 0.1, 0.2, 0.3, 0.4], [9.0, 9.0, 9.0, 9.0, 9.0]])
    valid = torch.tensor([[True, True, True, True, False], [True] * 5, [True] * 5])
    assert MeanRatio(0.5, 0.5, 0.0, 1.0).counts(ranking, valid).tolist() == [3, 1, 5]
    assert MeanRatio(0.5, 0.5, 0.4, 0.6).counts(ranking, valid).tolist() == [2, 2, 3]
    assert MeanRatio(0.5, 99.0, 0.0, 1.0).counts(ranking, valid).tolist() == [1, 1, 1]  # never none


def test_a_rule_is_a_number_and_survives_copies():
    rule = MeanRatio(0.2, 1.5)
    assert 0 < rule <= 1 and (rule.low, rule.high) == (0.1, 0.4)
    for again in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule)), eval(repr(rule))):
        assert type(again) is MeanRatio and vars(again) == vars(rule) and again == 0.2
    for arguments in ((0.0, 1.0), (1.2, 1.0), (0.2, 1.0, 0.3, 0.4), (0.2, 1.0, 0.1, 0.15)):
        with pytest.raises(ValueError, match="MeanRatio: mean="):
            MeanRatio(*arguments)


@pytest.mark.parametrize("encoder", ["sparse", "focus"])
def test_a_budget_does_not_depend_on_the_batch(encoder):
    model = exact(shrink(composed("deformable_detr", encoder)))
    batch = images()
    seen = token_rankings(model, [[image] for image in batch])
    model.transformer.encoder.keep_ratio = MeanRatio.calibrate(seen, 0.3)
    assert_alone_as_in_a_batch(model, batch)
    with recorded_output(model) as outputs, torch.no_grad():
        model(batch)
        for image in batch:
            model([image])
    together, *alone = (output.encoded.kept.budgets for output in outputs)
    assert together.tolist() == torch.cat(alone).tolist()
    shares = together / torch.tensor([len(r) for r in seen])
    assert shares.std() > 0.01 and sum(together) == pytest.approx(0.3 * sum(map(len, seen)), abs=1)


@pytest.mark.parametrize("config", [SPARSE, FOCUS])
def test_images_of_one_size_keep_different_numbers(config):
    """As published otherwise: without padding there is nothing in a batch that could matter."""
    model = reveal(tiny_model(config)).double().eval()
    batch = [sample(96, 128, annotated=False, seed=seed) for seed in range(3)]
    batch[1]["image"] = batch[1]["image"] / 8
    seen = token_rankings(model, [batch])
    model.transformer.encoder.keep_ratio = MeanRatio.calibrate(seen, 0.3)
    with recorded_output(model) as outputs, torch.no_grad():
        model(batch)
        for image in batch:
            model([image])
    together, *alone = outputs
    assert len(set(together.encoded.kept.budgets.tolist())) > 1
    for image, single in enumerate(alone):
        torch.testing.assert_close(together.encoded.memory[image], single.encoded.memory[0])
        torch.testing.assert_close(together.logits[image], single.logits[0])


def test_calibrating_leaves_the_model_as_it_was_and_names_what_it_cannot_do():
    model = tiny_model(SPARSE).eval()
    token_rankings(model, [[sample(64, 80, annotated=False)]])
    assert model.transformer.encoder.keep_ratio == 0.3
    with pytest.raises(UserError, match="no image to calibrate on"):
        token_rankings(model, [])
    with pytest.raises(UserError, match="DenseEncoder, has no keep ratio"):
        token_rankings(tiny_model().eval(), [])


def test_multiply_adds_are_those_of_the_mean():
    model = tiny_model(SPARSE)
    wanted = analyze(model, (64, 96)).total
    model.transformer.encoder.keep_ratio = MeanRatio(0.3, 0.0)
    assert analyze(model, (64, 96)).total == wanted
    assert isinstance(model.transformer.encoder.keep_ratio, MeanRatio)


@torch.no_grad()
def test_a_rule_is_exported_and_stands_in_a_config():
    rule = "{_target_: sparse_detr.modeling.MeanRatio, mean: 0.3, threshold: 0.02}"
    cfg = shrink(get_config(SPARSE, [f"+model.transformer.encoder.keep_ratio={rule}"]).model)
    cfg.in_features, cfg.neck.in_channels, cfg.transformer.num_levels = ["res4"], [16], 2
    model = reveal(instantiate(cfg)).eval()
    assert model.transformer.encoder.keep_ratio.threshold == 0.02
    inputs = [torch.rand(1, 3, *size) * 255 for size in ((96, 160), (160, 128))]
    model.transformer.encoder.keep_ratio = MeanRatio.calibrate(
        token_rankings(model, [[{"image": image[0]}] for image in inputs]), 0.3
    )
    program = export.export_program(model, (96, 160)).module()
    for image in inputs:
        wanted = export.TensorDetector(model)(image)
        torch.testing.assert_close(program(image), wanted, rtol=1e-5, atol=1e-4)
