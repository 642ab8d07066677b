"""Focus-DETR's encoder: what is foreground, who is refreshed, who talks to whom, on any base."""

import pytest
import torch
from detectron2.config import instantiate
from torch.testing import assert_close

from sparse_detr.config import get_config
from sparse_detr.engine.convert import convert_state_dict
from sparse_detr.modeling.encoders.foreground import foreground_loss, foreground_targets
from sparse_detr.modeling.tokens import gather_tokens

from .tiny import SHAPES, feature_maps, masks, reveal, sample, shrink, total_losses

FOCUS = "focus_detr/focus_detr_r50_4scale_12ep"
ON_DEFORMABLE = "focus_detr/focus_deformable_detr_r50_50ep"
TWO_STAGE = "deformable_detr/deformable_detr_r50_two_stage_50ep"
ONE_STAGE = "deformable_detr/deformable_detr_r50_50ep"
REFINE = "deformable_detr/deformable_detr_r50_refine_50ep"
STRIDES = (8, 16, 32, 64)
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 999999))


def focus(config=FOCUS, seed=0, **encoder):
    """The shipped config, or Focus-DETR's encoder on another base, shrunk and built."""
    torch.manual_seed(seed)
    model = get_config(config).model
    transformer = model.transformer
    if "keep_ratio" not in transformer.encoder:
        transformer.encoder = get_config("encoders/focus.py").encoder
    if "proposal_head" not in transformer:  # single stage: its heads learn as the decoder's
        transformer.proposal_head = get_config("models/dino.py").model.transformer.proposal_head
        transformer.share_proposal_heads = True
    shrink(model)
    model.transformer.encoder.update({"num_objects": 5, **encoder})
    return reveal(instantiate(model))


def encode(model, *valid, maps=None):
    transformer = model.double().eval().transformer
    maps = feature_maps(len(valid)) if maps is None else maps
    tokens = transformer.tokenize(maps, masks(*valid))
    return transformer.encoder(tokens, transformer.proposal_head), tokens


# ------------------------------------------------------------------------------------- foreground


def by_definition(boxes, shapes, distance):
    """Foreground targets of one image, token by token and box by box."""
    targets = []
    for (height, width), stride, (low, high) in zip(shapes, STRIDES, RANGES):
        for i in range(height):
            for j in range(width):
                x, y = j * stride + stride // 2, i * stride + stride // 2
                found = False
                for x1, y1, x2, y2 in boxes.tolist():
                    sides = (x - x1, y - y1, x2 - x, y2 - y)
                    far = max(sides)
                    if distance == "centre":
                        far = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
                    found |= min(sides) > 0 and low < far <= high
                targets.append(found)
    return torch.tensor(targets)


@pytest.mark.parametrize("distance", ["side", "centre"])
def test_foreground_is_what_the_definition_says(distance):
    shapes = ((25, 31), (13, 16), (7, 8), (4, 4))
    generator = torch.Generator().manual_seed(1)
    images = []
    for count, size in ((6, 0.3), (0, 0), (3, 1.0), (1, 0.05)):
        corner = torch.rand(count, 2, generator=generator, dtype=torch.double) * 0.7
        extent = torch.rand(count, 2, generator=generator, dtype=torch.double) * size
        scale = torch.tensor([248.0, 200.0] * 2)
        images.append(torch.cat([corner, (corner + extent).clamp(max=1)], 1) * scale)
    found = foreground_targets(images, shapes, STRIDES, RANGES, distance)
    for boxes, targets in zip(images, found):
        assert torch.equal(targets, by_definition(boxes, shapes, distance))
    assert found[0].any() and not found[1].any()


def test_edges_are_outside_and_upper_limits_inside():
    shapes = ((1, 4), (1, 1))  # cells at x = 4, 12, 20, 28 and x = 8; y = 4 and 8
    ranges = ((-1, 16), (16, 100))

    def first_level(*box):
        boxes = [torch.tensor([box], dtype=torch.double)]
        return foreground_targets(boxes, shapes, (8, 16), ranges)[0].tolist()

    assert first_level(4, 0, 20, 8) == [False, True, False, False, False]
    assert first_level(12 - 16, 0, 13, 8)[:2] == [True, True]  # 16 to the left side
    assert first_level(12 - 16.5, 0, 13, 8)[:2] == [True, False]


def test_overlapping_ranges_only_add_foreground():
    boxes = [torch.tensor([[10.0, 20.0, 150.0, 170.0], [30.0, 30.0, 70.0, 60.0]])]
    shapes = ((25, 31), (13, 16), (7, 8), (4, 4))
    apart = foreground_targets(boxes, shapes, STRIDES, RANGES)
    overlapping = ((-1, 64), (32, 128), (64, 256), (128, 999999))
    both = foreground_targets(boxes, shapes, STRIDES, overlapping)
    assert (both | ~apart).all() and both.sum() > apart.sum()


def test_no_boxes_at_all_leave_background_only():
    targets = foreground_targets([torch.zeros(0, 4)] * 2, SHAPES, STRIDES, RANGES)
    assert targets.shape == (2, 256) and not targets.any()
    logits = torch.randn(*targets.shape)
    p = logits.sigmoid()
    assert_close(foreground_loss(logits, targets), (-0.75 * p**2 * (1 - p).log()).sum(1).mean())


def test_the_loss_is_a_focal_sum_per_foreground_token():
    logits = torch.randn(3, 40, dtype=torch.double)
    targets = torch.rand(3, 40) < 0.2
    targets[2] = False
    p = logits.sigmoid()
    loss = torch.where(targets, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()).sum(1)
    assert_close(foreground_loss(logits, targets), (loss / targets.sum(1).clamp(min=1)).mean())


def test_the_loss_is_finite_for_any_logit():
    """log(sigmoid(x)) in float32 is infinite from about +-17 or -88 on."""
    logits = torch.tensor([[200.0, -200.0, 200.0, -200.0]], requires_grad=True)
    loss = foreground_loss(logits, torch.tensor([[False, True, True, False]]))
    assert_close(loss, torch.tensor((0.75 * 200 + 0.25 * 200) / 2))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert foreground_loss(logits.half(), torch.zeros(1, 4, dtype=torch.bool)).isfinite()


def test_coarse_scores_modulate_fine_ones():
    """Level l + 1, upsampled corner to corner, scales level l before it is scored."""
    transformer = focus().double().transformer
    scorer = transformer.encoder.foreground
    tokens = transformer.tokenize(feature_maps(), masks((1, 1)))
    levels = tokens.split_levels(tokens.features)
    with torch.no_grad():
        scorer.alpha.copy_(torch.tensor([0.0, 0.0, 0.75]))  # coarse to fine: only 1 onto 0
        scores = scorer(tokens.features, tokens)
        each = [scorer.scorer(x) for x in levels]
        assert_close(scores[:, 12 * 16 :], torch.cat(each[1:], dim=1))
        above = torch.nn.functional.interpolate(
            each[1].view(1, 1, 6, 8), (12, 16), mode="bilinear", align_corners=True
        ).view(1, -1, 1)
        finest = scores[:, : 12 * 16]
        wanted = scorer.scorer(levels[0] * (1 + 0.75 * above))
        assert_close(finest, wanted, rtol=0, atol=1e-12)
        assert (finest - each[0]).abs().max() > 1e-8
        # The scoring network's LayerNorm undoes a positive factor, but for its eps.
        assert (1 + 0.75 * above).min() > 0
        assert_close(finest, each[0], rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------- encoder


def test_layers_refresh_a_shrinking_share_of_the_best_tokens():
    encoded, tokens = encode(focus(keep_ratio=0.5, layer_ratios=[0.8, 0.3]), (1, 1), (0.5, 0.75))
    budgets = encoded.selected_mask.sum(1)
    assert torch.equal(budgets, (~tokens.mask).sum(1) // 2 + 1)
    kept = int(budgets.max())
    assert encoded.intermediate["layer_counts"] == (int(0.8 * kept), int(0.3 * kept))
    ranked = gather_tokens(encoded.scores, encoded.selected)[encoded.selected_mask]
    assert (ranked[:kept].diff() <= 0).all() and (ranked[kept:].diff() <= 0).all()

    changed = (encoded.memory != tokens.features).any(-1)
    wanted = torch.zeros_like(changed)
    for image, budget in enumerate(budgets.tolist()):
        wanted[image, encoded.selected[image, : min(budget, int(0.8 * kept))]] = True
    assert torch.equal(changed, wanted)
    assert not (changed & tokens.mask).any()


@pytest.mark.parametrize("settings", [{}, {"mask_padding": True}, {"running_value": True}])
def test_the_order_of_visits_changes_nothing(monkeypatch, settings):
    def run():
        model = focus(keep_ratio=0.5, layer_ratios=[0.8, 0.3], num_objects=10, **settings)
        return encode(model.double().eval(), (1, 1), (0.5, 0.75))[0]

    by_place = run()
    monkeypatch.setattr(
        "sparse_detr.modeling.selection.visiting_order",
        lambda ranked, tokens: torch.arange(ranked.shape[1]).expand_as(ranked),
    )
    best_first = run()
    assert torch.equal(by_place.selected, best_first.selected)
    assert torch.equal(by_place.selected_mask, best_first.selected_mask)
    assert_close(by_place.memory, best_first.memory)
    for found, wanted in zip(by_place.intermediate["objects"], best_first.intermediate["objects"]):
        assert torch.equal(found, wanted)  # best first, whichever rows they came from


def test_object_tokens_have_the_best_product_of_class_and_foreground_logit():
    model = focus(num_objects=7)
    encoded, tokens = encode(model, (1, 1))
    (first, _) = encoded.intermediate["objects"]
    logits = model.transformer.proposal_head.class_head(tokens.features).amax(-1)
    score = (logits * encoded.scores)[0, encoded.selected[0]]
    assert torch.equal(encoded.selected[0, score.topk(7).indices], first[0])


def test_two_unlikely_factors_make_a_likely_object_only_as_logits():
    chosen = {}
    for probabilities in (False, True):
        model = focus(num_objects=1, probabilities=probabilities)
        encoder, head = model.transformer.encoder, model.transformer.proposal_head
        head.class_head = torch.nn.Linear(32, 3)  # a token's class logit is its first channel
        torch.nn.init.zeros_(head.class_head.weight)
        torch.nn.init.zeros_(head.class_head.bias)
        with torch.no_grad():
            head.class_head.weight[:, 0] = 1.0
        x = torch.zeros(1, 2, 32)
        x[0, :, 0] = torch.tensor([2.0, -4.0])
        foreground = torch.tensor([[3.0, -5.0]])
        chosen[probabilities] = int(encoder.objects(x, foreground, None, head))
    assert chosen == {False: 1, True: 0}


def test_values_are_the_input_or_run_with_the_layers():
    fixed, running = (encode(focus(running_value=r), (1, 1))[0] for r in (False, True))
    assert torch.equal(fixed.selected, running.selected)
    assert not torch.allclose(fixed.memory, running.memory)
    one, other = (
        encode(focus(num_layers=1, layer_ratios=[1.0], running_value=r), (1, 1))[0] for r in (False, True)
    )
    assert torch.equal(one.memory, other.memory)  # the first layer sees the input either way


@pytest.mark.parametrize("mask_padding", [True, False])
def test_an_image_is_encoded_alone_as_in_a_batch_only_if_padding_is_masked(mask_padding):
    model = focus(mask_padding=mask_padding, num_objects=30).double().eval()
    # With negative class logits the lowest foreground score, which padding has, becomes the best.
    torch.nn.init.constant_(model.transformer.proposal_head.class_head.bias, -4.6)
    alone, _ = encode(model, (1, 1))
    maps = []
    for m in feature_maps():
        h, w = m.shape[-2:]
        maps.append(torch.randn(2, 32, h, w * 3, dtype=torch.double))  # beside a larger image
        maps[-1][:1, :, :, :w] = m
    transformer = model.transformer
    levels = [torch.zeros(2, *m.shape[-2:], dtype=torch.bool) for m in maps]
    for level, (_, w) in zip(levels, SHAPES):
        level[0, :, w:] = True
    tokens = transformer.tokenize(maps, levels)
    batched = transformer.encoder(tokens, transformer.proposal_head)
    memory = batched.memory[0, ~tokens.mask[0]]
    assert torch.allclose(memory, alone.memory[0]) == mask_padding
    if mask_padding:
        # The grid of the top-down upsampling still spans the padded maps.
        assert_close(batched.scores[0, ~tokens.mask[0]], alone.scores[0], rtol=0, atol=1e-5)
        assert int(batched.selected_mask[0].sum()) == alone.selected.shape[1]


def test_results_follow_the_order_of_the_images():
    model = focus().double().eval()
    maps = feature_maps(2)
    forward, _ = encode(model, (1, 1), (0.5, 0.75), maps=maps)
    backward, _ = encode(model, (0.5, 0.75), (1, 1), maps=[m.flip(0) for m in maps])
    assert_close(forward.memory, backward.memory.flip(0))


def test_only_the_selection_learns_from_the_foreground_loss():
    model = focus().train()
    model([sample(64, 96)])["loss_foreground"].backward()
    moved = {
        ".".join(name.split(".")[:3])
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert {
        "transformer.encoder.foreground",
        "transformer.proposal_head.projection",
        "transformer.proposal_head.norm",
        "neck.convs.0",
    } <= moved
    assert not any(
        name.startswith(("transformer.encoder.layers", "transformer.decoder", "transformer.heads"))
        for name in moved
    )
    assert "transformer.proposal_head.class_head" not in moved
    foreground = model.transformer.encoder.foreground
    assert all(p.grad.abs().max() > 0 for p in foreground.parameters())


# ------------------------------------------------------------------------------------ composition


@pytest.mark.parametrize("config", [FOCUS, ON_DEFORMABLE, TWO_STAGE, ONE_STAGE, REFINE])
@pytest.mark.parametrize("num_boxes", [2, 0])
def test_a_training_step_reaches_every_trained_parameter(config, num_boxes):
    """On every base, also when no image of the batch has an object."""
    model = focus(config).train()
    losses = model([sample(70, 90, num_boxes, seed=1), sample(64, 120, num_boxes, seed=2)])
    assert "loss_foreground" in losses and all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("config", [FOCUS, ON_DEFORMABLE, ONE_STAGE])
def test_a_few_steps_on_one_image_reduce_the_loss(config):
    totals = total_losses(focus(config).train(), [sample(64, 64)], steps=32, lr=2e-3)
    assert sum(totals[-4:]) / 4 < 0.8 * totals[0]


@pytest.mark.parametrize("counts", [(0, 2), (1,), (200,), (200, 0)])
def test_any_number_of_objects_trains(counts):
    losses = focus().train()([sample(40, 56, num_boxes=n, seed=i) for i, n in enumerate(counts)])
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize("size", [(33, 200), (16, 16), (1, 40), (70, 90)])
def test_images_with_fewer_tokens_than_object_tokens(size):
    """The published code needs 300 tokens in its last layer: it fails below about 380 x 380."""
    model = focus(num_objects=300)
    losses = model.train()([sample(*size, num_boxes=1)])
    assert all(v.isfinite() for v in losses.values())
    with torch.no_grad():
        (result,) = model.eval()([sample(*size, annotated=False)])
    assert result["instances"].pred_boxes.tensor.isfinite().all()


def test_bfloat16_autocast_trains():
    model = focus().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([sample(64, 80), sample(56, 64, seed=1)])
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    sum(losses.values()).backward()


def test_the_keep_ratio_of_a_built_model_can_be_changed():
    model = focus()
    for ratio in (0.5, 0.1, 1.0):
        model.transformer.encoder.keep_ratio = ratio
        encoded, _ = encode(model, (1, 1))
        num_tokens = sum(h * w for h, w in SHAPES)
        assert encoded.selected.shape[1] == min(int(num_tokens * ratio) + 1, num_tokens)


def test_three_levels_and_other_depths_work():
    model = shrink(get_config(FOCUS).model)
    model.transformer.num_levels = 3
    model.transformer.encoder.update(
        num_layers=3,
        layer_ratios=[1.0, 0.5, 0.5],
        strides=[8, 16, 32],
        size_ranges=[[-1, 64], [64, 128], [128, 999999]],
    )
    losses = instantiate(model).train()([sample(64, 96)])
    assert losses["loss_foreground"].isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio=\[0.0\] must lie in \(0, 1\]"),
        ({"layer_ratios": [1.0, 1.5]}, r"layer_ratios=\[1.0, 1.5\] must lie in \(0, 1\]"),
        ({"layer_ratios": [1.0]}, "layer_ratios has 1 entries for 2 layers"),
        ({"strides": [8, 16]}, r"strides has 2 entries for 4 levels: set .*encoder\.strides"),
        ({"size_ranges": [[0, 1]]}, "size_ranges has 1 entries for 4 levels"),
        ({"distance": "corner"}, "distance='corner' is not one of side, centre"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        focus(**settings)


def test_a_single_stage_base_needs_a_proposal_head():
    model = shrink(get_config(ONE_STAGE).model)
    model.transformer.encoder = get_config("encoders/focus.py").encoder
    with pytest.raises(ValueError, match="FocusEncoder needs a two-stage head"):
        instantiate(shrink(model))


DETREX_NAMES = {
    "transformer.alpha": "transformer.encoder.foreground.alpha",
    "transformer.enc_mask_predictor.layer1.1.weight": "transformer.encoder.foreground.scorer.layer1.1.weight",
    "transformer.encoder.layers.1.attentions.0.attn.in_proj_weight": "transformer.encoder.layers.1.object_attention.in_proj_weight",
    "transformer.encoder.layers.1.norm2.bias": "transformer.encoder.layers.1.object_norm.bias",
    "transformer.encoder.layers.1.attentions.1.value_proj.weight": "transformer.encoder.layers.1.attention.value_proj.weight",
    "transformer.encoder.layers.1.norms.0.weight": "transformer.encoder.layers.1.norm.weight",
    "class_embed.2.weight": "transformer.proposal_head.class_head.weight",
}


def test_detrex_names_are_converted_and_second_names_are_dropped():
    model = focus()
    expected = model.state_dict()
    state = {name: torch.randn_like(expected[own]) for name, own in DETREX_NAMES.items()}
    aliases = ["transformer.encoder.enhance_MCSP.0.weight", "enhance_MCSP_layerlist.1.weight"]
    state.update(dict.fromkeys(aliases, state["class_embed.2.weight"]))
    converted, report = convert_state_dict(state, model)
    assert not report.unexpected and sorted(report.ignored) == sorted(aliases)
    for name, own in DETREX_NAMES.items():
        assert converted[own] is state[name]
