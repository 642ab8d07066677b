"""Hybrid matching: two groups of queries that do not meet, one of them matched several times."""

import pytest
import torch
from detectron2.config import instantiate
from torch.testing import assert_close

from sparse_detr.config import get_config
from sparse_detr.engine.convert import convert_state_dict
from sparse_detr.modeling import Target
from sparse_detr.modeling.criterion import Predictions

from .tiny import reveal, sample, shrink, tiny_model

HYBRID = "h_deformable_detr/h_deformable_detr_r50_12ep"
FIRST, SECOND, REPEAT = 8, 12, 6


def hybrid(seed=0, **options):
    """The shipped config, shrunk and built, with nothing hidden behind zero weights."""
    torch.manual_seed(seed)
    cfg = shrink(get_config(HYBRID).model)
    cfg.transformer.query_selection.update(options)
    return reveal(instantiate(cfg))


def batch():
    return [sample(96, 90, seed=1), sample(64, 120, num_boxes=3, seed=2)]


def train(model):
    """Targets and output of one training pass."""
    inputs = batch()
    targets = model.targets(inputs)
    return targets, model.train().detect(model.preprocess(inputs), targets)


def test_the_published_sizes():
    selection = get_config(HYBRID).model.transformer.query_selection
    assert (selection.num_queries, selection.num_one_to_many) == (300, 1500)
    assert (selection.repeat, selection.weight) == (6, 1.0)


def test_training_has_both_groups_and_inference_the_first():
    model = hybrid()
    _, output = train(model)
    assert [(g.size, g.assignment.suffix, g.assignment.repeat) for g in output.groups] == [
        (FIRST, "", 1),
        (SECOND, "_one2many", REPEAT),
    ]
    assert output.decoded.logits[0].shape[1] == FIRST + SECOND
    assert output.logits.shape[1] == FIRST
    with torch.no_grad():
        output = model.eval().detect(model.preprocess(batch()))
    assert [g.size for g in output.groups] == [FIRST]
    assert output.decoded.logits[-1].shape[1] == output.logits.shape[1] == FIRST


def test_the_groups_do_not_see_each_other():
    """Each predicts the same as if the other were not there."""
    model = hybrid().double()
    images = model.preprocess(batch())
    with torch.no_grad():
        both = model.train().detect(images)
        alone = model.eval().detect(images)
        # Other contents in one group leave the predictions of the other as they are.
        model.train().transformer.query_selection.content.weight[:FIRST].normal_()
        changed = model.detect(images)
    assert_close(both.logits, alone.logits)
    assert_close(both.boxes, alone.boxes)
    for a, b in zip(both.decoded.boxes, changed.decoded.boxes):
        assert_close(a[:, FIRST:], b[:, FIRST:])
        assert not torch.isclose(a[:, :FIRST], b[:, :FIRST]).any()


def test_queries_are_ranked_proposals_with_learned_contents():
    model, seen = hybrid(), []
    model.transformer.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, output = train(model)
    queries, proposals = seen[0], output.proposals
    content = model.transformer.query_selection.content.weight
    assert torch.equal(queries.content, content.expand(2, -1, -1)) and queries.content.requires_grad
    scores = proposals.logits[..., 0].gather(1, proposals.selected)  # channel 0 is foreground
    assert (scores.diff(dim=1) <= 0).all()
    best = proposals.boxes.gather(1, proposals.selected[..., None].expand(-1, -1, 4))
    assert_close(queries.reference, best) and not queries.reference.requires_grad


def test_positions_are_the_first_half_of_the_coded_boxes():
    selection = hybrid().transformer.query_selection
    assert selection.position_proj.weight.shape == (64, 64)
    assert selection.position_norm.weight.shape == (64,)
    assert 0.8 < selection.content.weight.std() < 1.2  # N(0, 1), not Xavier


def test_every_object_is_matched_several_times_in_the_second_group():
    model = hybrid()
    targets, output = train(model)
    sets = model.transformer.predictions(output)
    assert [p.assignment.suffix for p in sets] == ["", "_0", "_one2many", "_one2many_0", "_enc"]
    for prediction, match in zip(sets, model.criterion.match(sets, targets)):
        repeat = prediction.assignment.repeat
        assert repeat == (REPEAT if "one2many" in prediction.assignment.suffix else 1)
        # an image has 12 queries in the group: enough for 2 * 6 objects, not for 3 * 6
        first = match.target[match.batch == 0] % 2
        assert first.bincount().tolist() == [repeat] * 2
        assert (match.batch == 1).sum() == min(prediction.logits.shape[1], 3 * repeat)


def test_the_second_loss_is_the_criterion_on_repeated_objects():
    """As published: the first loss's twin, for targets that are repeated, times the weight."""
    model = hybrid(weight=0.5)
    targets, output = train(model)
    losses = model.losses(output, targets)
    repeated = [Target(t.labels.repeat(REPEAT), t.boxes.repeat(REPEAT, 1), t.size) for t in targets]
    for layer, suffix in ((1, ""), (0, "_0")):
        alone = model.criterion(
            [Predictions(output.decoded.logits[layer][:, FIRST:], output.decoded.boxes[layer][:, FIRST:])],
            repeated,
        )
        for name, value in alone.items():
            assert_close(losses[f"{name}_one2many{suffix}"], 0.5 * value)


def test_without_objects_both_losses_are_those_of_one_object():
    """The divisor is at least 1, for repeated objects too."""
    model = hybrid()
    losses = model.train()([sample(64, 64, num_boxes=0)])
    targets = [Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), (64, 64))]
    output = model.detect(model.preprocess([sample(64, 64, num_boxes=0)]), targets)
    alone = model.criterion(
        [Predictions(output.decoded.logits[-1][:, FIRST:], output.decoded.boxes[-1][:, FIRST:])], targets
    )
    assert_close(losses["loss_class_one2many"], alone["loss_class"])


def test_a_training_step_reaches_every_parameter():
    model = hybrid()
    targets, output = train(model)
    losses = model.losses(output, targets)
    assert set(losses) == {
        f"loss_{kind}{suffix}"
        for kind in ("class", "bbox", "giou")
        for suffix in ("", "_0", "_one2many", "_one2many_0", "_enc")
    }
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [(64, 64), (1, 40), (16, 16)])  # 85, 11 and 7 tokens
def test_images_with_fewer_tokens_than_queries(size):
    model = hybrid(num_one_to_many=100)
    losses = model.train()([sample(*size, num_boxes=1)])
    assert all(value.isfinite() for value in losses.values())
    assert "loss_class_one2many" in losses  # the same losses for every batch
    sum(losses.values()).backward()
    with torch.no_grad():
        (result,) = model.eval()([sample(*size, annotated=False)])
    assert result["instances"].pred_boxes.tensor.isfinite().all()


def test_without_a_second_group_it_is_a_plain_detector():
    model = hybrid(num_one_to_many=0)
    _, output = train(model)
    assert [g.assignment.suffix for g in output.groups] == [""]


def test_published_contents_are_recognised():
    """One matrix of contents, where single-stage models keep positions and contents in one."""
    model = hybrid()
    weight = torch.randn(FIRST + SECOND, 32)
    state = {
        "query_embed.weight": weight,
        "transformer.encoder.layers.0.self_attn.value_proj.bias": torch.zeros(32),
    }
    converted, report = convert_state_dict(state, model)
    assert report.family == "deformable" and not report.unexpected
    assert torch.equal(converted["transformer.query_selection.content.weight"], weight)


def test_lite_h_detr_is_lite_detrs_encoder_and_attention_on_h_detr():
    """Every part has the parameters, under the same names, that it has where it comes from."""
    lite_h, lite, h = (
        {name: value.shape for name, value in tiny_model(config).state_dict().items()}
        for config in (
            "lite_detr/lite_h_detr_r50_h3l1_2p1x3_36ep",
            "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep",
            HYBRID,
        )
    )
    from_lite = {k for k in lite_h if "transformer.encoder." in k or ".cross_attention." in k}
    assert any("cross_attention.query_proj" in k for k in from_lite)
    for part, source in ((from_lite, lite), (set(lite_h) - from_lite, h)):
        assert {k: lite_h[k] for k in part} == {k: source[k] for k in part if k in source}
    # nothing of H-DETR is lost but what was replaced
    assert all("transformer.encoder." in k or ".cross_attention." in k for k in set(h) - set(lite_h))
