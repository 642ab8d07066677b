"""Elastic training: which keep ratios a batch gets, and what is learned from them."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from sparse_detr.config import get_config
from sparse_detr.engine.elastic import ElasticWarmup
from sparse_detr.errors import UserError
from sparse_detr.modeling.criterion import BatchPart
from sparse_detr.modeling.elastic import KeepRatios
from sparse_detr.modeling.encoders.dam import attention_map_share, attention_map_target

from .tiny import reveal, sample, shrink

RANGE = KeepRatios(0.05, 1.0)
SPARSE = "sparse_detr/sparse_detr_r50_30_50ep"
FOCUS = "focus_detr/focus_detr_r50_4scale_12ep"


def elastic_model(config=SPARSE, **encoder):
    torch.manual_seed(0)
    cfg = shrink(get_config(config).model)
    cfg.transformer.encoder.update({"elastic": [0.05, 1.0], **encoder})
    return reveal(instantiate(cfg)).double().train()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 16])
def test_every_image_has_one_ratio_and_half_of_them_the_highest(batch_size):
    highest = 0
    for step in range(10):
        seen = []
        for ratio, members in RANGE.groups(batch_size, step):
            assert 0.05 <= ratio <= 1
            seen += range(batch_size)[members]
            highest += len(range(batch_size)[members]) * (ratio == 1)
        assert seen == list(range(batch_size))
    assert highest == 10 * batch_size / 2


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_other_ratios_fill_the_range_evenly_in_their_logarithm(batch_size):
    found = [
        ratio for step in range(200) for ratio, _ in RANGE.groups(batch_size, step) if ratio < RANGE.highest
    ]
    share = torch.tensor(found).log().sub(torch.tensor(0.05).log()) / torch.tensor(20.0).log()
    counts = share.histc(10, 0, 1)
    assert counts.min() > 0.7 * counts.mean() and counts.max() < 1.3 * counts.mean()


@pytest.mark.parametrize("wrong", [(0.5, 0.1), (0.0, 1.0), (0.1, 1.1), (0.3, 0.3)])
def test_a_range_that_is_none_is_named(wrong):
    with pytest.raises(ValueError, match=rf"elastic=\[{wrong[0]}, {wrong[1]}\] must be the lowest"):
        KeepRatios(*wrong)


def test_without_a_scoring_network_it_is_refused():
    with pytest.raises(ValueError, match="needs a scoring network: set keep_ratio"):
        elastic_model(keep_ratio=None)


@pytest.mark.parametrize("config", [SPARSE, FOCUS])
def test_losses_are_those_of_each_group_at_its_ratio(config):
    model = elastic_model(config, loss_weight=1.0)
    model.transformer.denoising = None  # it draws at random
    batch = [sample(96, 128, num_boxes=seed, seed=seed) for seed in (1, 2, 3, 4)]
    with EventStorage(3):
        found = model(batch)
    encoder = model.transformer.encoder
    usual, ratios, encoder.elastic = encoder.keep_ratio, encoder.elastic, None
    assert usual in (0.3, 0.5)  # as it was before
    wanted = dict.fromkeys(found, 0.0)
    groups = list(ratios.groups(4, 3))
    assert len(groups) == 3
    for encoder.keep_ratio, members in groups:
        if "loss_mask_prediction" in found:
            encoder.elastic = ratios  # what the scorer learns
        images, targets = model.preprocess(batch[members]), model.targets(batch[members])
        losses = model.losses(model.detect(images, targets), targets, BatchPart(1 + 2 + 3 + 4))
        for name, value in losses.items():
            mean_of_images = name in ("loss_mask_prediction", "loss_foreground")
            wanted[name] += value * (len(targets) / 4 if mean_of_images else 1)
    torch.testing.assert_close(found, wanted)


def test_the_log_has_the_mean_of_the_images():
    """Of what each group of one ratio would log; not the last group's, whose ratio changes with the step."""
    model = elastic_model()
    batch = [sample(96, 128, seed=seed) for seed in range(4)]
    with EventStorage(3) as storage:
        model(batch)
    found = storage.histories()["corr_mask_attn_map_dec_all"].values()
    encoder, wanted = model.transformer.encoder, 0.0
    ratios, encoder.elastic = encoder.elastic, None
    for encoder.keep_ratio, members in ratios.groups(4, 3):
        with EventStorage(3) as storage:
            model(batch[members])
        share = storage.latest()["corr_mask_attn_map_dec_all"][0]
        assert share < 1 or encoder.keep_ratio == 1
        wanted += share * len(batch[members]) / 4
    assert found == [(pytest.approx(wanted, rel=1e-5), 3)]


def test_a_step_decides_the_ratios_also_in_a_resumed_run():
    model = elastic_model()
    batch = [sample(96, 128, seed=seed) for seed in range(4)]
    totals = []
    for step in (5, 6, 5):
        with EventStorage(step):
            totals.append(sum(model(batch).values()).item())
    assert totals[0] == totals[2] != totals[1]


def test_the_scorers_target_is_the_mean_over_all_budgets():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 60, generator=generator, dtype=torch.float64)
    mask = torch.zeros(2, 60, dtype=torch.bool)
    mask[1, 40:] = True
    draws = 4000
    total = torch.zeros_like(attention)
    for draw in range(draws):
        budgets = (~mask).sum(1) * RANGE.quantile((draw + 0.5) / draws)
        kept = torch.arange(60) < (budgets.long() + 1).clamp(max=60)[:, None]
        total += attention_map_target(attention, mask, kept & (torch.arange(60) < (~mask).sum(1)[:, None]))
    found = attention_map_share(attention, mask, RANGE)
    torch.testing.assert_close(found, total / draws, atol=1e-3, rtol=0)
    assert found[1, 40:].eq(0).all() and found.amax(1).eq(1).all()


def test_while_warming_up_all_images_take_the_middle():
    ratios = KeepRatios(0.1, 0.9)
    ratios.warming_up = True
    for batch, step in ((4, 0), (1, 1)):
        ((ratio, members),) = ratios.groups(batch, step)
        assert ratio == pytest.approx(0.3) and members == slice(0, batch)


@pytest.mark.parametrize("share, wanted", [(0.5, [True, True, False, False]), (0, [False] * 4)])
def test_the_trainer_ends_the_warm_up(share, wanted):
    ratios, found = KeepRatios(0.1, 1.0), []
    hook = ElasticWarmup(ratios, share)
    for step in range(4):  # as in a resumed run, whatever came before
        hook.trainer = SimpleNamespace(iter=step, max_iter=4)
        hook.before_step()
        found.append(ratios.warming_up)
    assert found == wanted


def test_a_share_of_training_that_is_none_is_named():
    with pytest.raises(UserError, match=r"train.elastic_warmup=2 must be a share"):
        ElasticWarmup(RANGE, 2)
