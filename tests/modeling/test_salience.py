"""Salience DETR: which tokens are salient and kept, what the others get, and the parts around it."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from torch.testing import assert_close

from sparse_detr.config import get_config
from sparse_detr.engine.convert import convert_state_dict
from sparse_detr.engine.fine_tune import backbone_names
from sparse_detr.modeling import FusionNeck, HungarianMatcher, SetCriterion, StagedBackbone, build_swin
from sparse_detr.modeling.boxes import iou
from sparse_detr.modeling.criterion import Predictions, iou_aware_focal_loss
from sparse_detr.modeling.encoders.salience import salience_loss, salience_targets
from sparse_detr.modeling.fusion import FusionBlock
from sparse_detr.modeling.matcher import Assignment, Matches, Target
from sparse_detr.modeling.proposals import first_of_neighbours

from .tiny import SHAPES, feature_maps, masks, reveal, sample, shrink, total_losses

SALIENCE = "salience_detr/salience_detr_r50_4scale_12ep"
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 99999))


def salience(seed=0, **encoder):
    torch.manual_seed(seed)
    model = shrink(get_config(SALIENCE).model)
    model.transformer.fusion.norm = "BN"
    model.transformer.encoder.update({"num_objects": 5, **encoder})
    return reveal(instantiate(model))


@torch.no_grad()
def encode(model, *valid):
    transformer = model.double().eval().transformer
    tokens = transformer.tokenize(feature_maps(len(valid)), masks(*valid))
    return transformer.encoder(tokens, transformer.proposal_head), tokens


def per_level(index, tokens):
    """How many of the tokens ``index`` (K,) lie on each level."""
    starts = [*tokens.level_starts, tokens.mask.shape[1]]
    return [int(((index >= a) & (index < b)).sum()) for a, b in zip(starts, starts[1:])]


# ------------------------------------------------------------------------------------------ encoder


def test_each_level_keeps_its_own_share_and_all_are_ranked_together():
    encoded, tokens = encode(salience(level_ratios=[0.25, 0.5, 0.01, 1.0]), (1.0, 1.0))
    (ranked,) = encoded.kept.ranked
    sizes = [h * w for h, w in SHAPES]
    assert per_level(ranked, tokens) == [sizes[0] // 4, sizes[1] // 2, 0, sizes[3]]
    assert (encoded.scores[0, ranked].diff() <= 0).all()
    for level, (start, size) in enumerate(zip(tokens.level_starts, sizes)):
        of_level = ranked[(ranked >= start) & (ranked < start + size)]
        best = encoded.scores[0, start : start + size].topk(per_level(ranked, tokens)[level]).indices + start
        assert sorted(of_level.tolist()) == sorted(best.tolist())


@pytest.mark.parametrize("mask_padding", [True, False])
def test_budgets_in_a_padded_batch(mask_padding):
    encoded, tokens = encode(salience(mask_padding=mask_padding), (1.0, 1.0), (0.5, 0.75))
    ratios = torch.tensor([0.4, 0.8, 1.0, 1.0])
    own = (torch.tensor(tokens.level_counts) * ratios).long()  # (B, L)
    assert encoded.kept.budgets.tolist() == own.sum(1).tolist()
    small = encoded.kept.ranked[1, : own[1].sum()]
    if mask_padding:  # as published, padding may be kept, and levels may give to each other
        assert not tokens.mask[1, small].any()
        assert per_level(small, tokens) == own[1].tolist()
    assert per_level(encoded.kept.ranked[0], tokens) == own[0].tolist()


def test_tokens_that_the_last_layer_leaves_alone_get_the_vector_of_their_place():
    model = salience(num_places=4)
    encoded, tokens = encode(model, (1.0, 1.0), (0.5, 1.0))
    encoder = model.transformer.encoder
    refreshed = encoded.kept.ranked[:, : encoded.intermediate["layer_counts"][-1]]
    with torch.no_grad():
        for table in (encoder.background.row_embed, encoder.background.col_embed):
            table.weight.add_(1.0)
    moved = encode(model, (1.0, 1.0), (0.5, 1.0))[0].memory - encoded.memory  # (B, N, C)
    wanted = (~tokens.mask).double().scatter(1, refreshed, 0.0)
    assert_close(moved, wanted[..., None].expand_as(moved))
    code = encoder.background(((3, 6),)).unflatten(0, (3, 6))
    half = code.shape[-1] // 2
    assert_close(code[2, 1, :half], encoder.background.col_embed.weight[1])
    assert_close(code[2, 1, half:], encoder.background.row_embed.weight[2])
    assert_close(code[:, 5], code[:, 3])  # beyond the table


def test_a_size_range_that_is_missing_names_its_key():
    with pytest.raises(ValueError, match=r"level_ratios has 3 entries .* model.transformer.encoder"):
        salience(level_ratios=[0.4, 0.8, 1.0])
    with pytest.raises(ValueError, match="level_ratios=.* must lie in"):
        salience(level_ratios=[0.4, 0.8, 1.0, 1.5])


# --------------------------------------------------------------------------------- targets and loss


def by_definition(boxes, shapes, stride):
    """Targets of one image, token by token and box by box."""
    targets = []
    for (height, width), size, (low, high) in zip(shapes, stride, RANGES):
        for i in range(height):
            for j in range(width):
                x, y, positive, value = (j + 0.5) * size, (i + 0.5) * size, False, 0.0
                for x1, y1, x2, y2 in boxes.tolist():
                    sides = (x - x1, y - y1, x2 - x, y2 - y)
                    if min(sides) <= 0:
                        continue
                    positive |= low < max(sides) <= high
                    dx, dy = (sides[0] - sides[2]) / (x2 - x1), (sides[1] - sides[3]) / (y2 - y1)
                    value = max(value, 1 - (dx**2 + dy**2) ** 0.5 / 2)
                targets.append(value if positive else 0.0)
    return torch.tensor(targets, dtype=torch.float64)


def test_targets_are_as_defined():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(6, 2, generator=generator).double() * 100
    boxes = torch.cat([corner, corner + 10 + torch.rand(6, 2, generator=generator).double() * 300], dim=1)
    shapes, strides = ((32, 40), (16, 20), (8, 10), (4, 5)), (8, 16, 32, 64)
    model = salience().double()
    tokens = model.transformer.tokenize(
        [torch.zeros(1, 32, h, w).double() for h, w in shapes],
        [torch.zeros(1, h, w, dtype=torch.bool) for h, w in shapes],
        has_padding=False,
        padded_size=(256, 320),
    )
    found = salience_targets([boxes], tokens.pixels([(256, 320)]), shapes, RANGES)
    wanted = by_definition(boxes, shapes, strides)
    assert (wanted > 0).sum() > 50
    assert_close(found[0], wanted)
    empty = salience_targets([boxes[:0]], tokens.pixels([(256, 320)]), shapes, RANGES)
    assert not empty.any()


def test_the_loss_is_divided_by_the_salient_tokens_of_the_batch():
    logits, targets = torch.randn(2, 30).double(), torch.zeros(2, 30).double()
    targets[0, :4] = 0.5
    p = logits.sigmoid()
    weight = torch.where(targets > 0, 0.75 * p**2 * 0.5 + 0.25 * (1 - p) ** 2 * 0.5, 0.75 * p**2)
    wanted = weight * -(targets * p.log() + (1 - targets) * (1 - p).log())
    assert_close(salience_loss(logits, targets), wanted.sum() / 4)
    mask = torch.arange(30).expand(2, -1) >= 20
    assert_close(salience_loss(logits, targets, mask), wanted[:, :20].sum() / 4)


def test_noise_makes_the_targets_soft():
    torch.manual_seed(0)
    model = salience(target_noise=0.5).train()
    assert model([sample(96, 90)])["loss_salience"].isfinite()


def test_it_learns():
    model = salience().train()
    batch = [sample(64, 96, seed=1), sample(80, 64, seed=2)]
    totals = total_losses(model, batch, steps=30, lr=1e-3)
    assert sum(totals[-3:]) < 0.8 * sum(totals[:3])


# --------------------------------------------------------------------------------------- its parts


def test_neighbours_do_not_both_become_queries():
    """A row of tokens of falling score: every second one, then the others, best first."""
    scores = -torch.arange(8.0)[None]
    order, kept = first_of_neighbours(scores, ((1, 8),), candidates=6, threshold=0.3)
    assert order.tolist() == [[0, 2, 4, 1, 3, 5]] and kept.tolist() == [3]
    order, kept = first_of_neighbours(scores, ((2, 4),), candidates=8, threshold=0.3)
    assert order[0, : kept[0]].tolist() == [0, 2, 5, 7]  # a chessboard
    order, kept = first_of_neighbours(scores, ((2, 4),), candidates=8, threshold=0.1)
    assert order[0, : kept[0]].tolist() == [0, 2]  # diagonal neighbours go as well
    scores[0, 0] = float("-inf")
    assert first_of_neighbours(scores, ((1, 8),), 8, 0.3)[1].tolist() == [4]


def test_there_are_queries_enough_where_few_are_kept():
    config = shrink(get_config(SALIENCE).model)
    config.transformer.query_selection.num_queries = 500
    config.transformer.fusion.norm = "BN"
    model = instantiate(config)
    batch = [sample(64, 64), sample(40, 64, seed=1)]
    assert all(loss.isfinite() for loss in model.train()(batch).values())
    with torch.no_grad():
        output = model.eval().detect(model.preprocess(batch))
    assert output.logits.shape[1] == output.tokens.mask.shape[1]
    assert all(len(set(row)) == len(row) for row in output.proposals.selected.tolist())


def test_a_class_score_learns_the_iou():
    logits = torch.tensor([[[0.3, -0.2], [0.1, 0.4]]], dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]], dtype=torch.float64)
    target = Target(torch.tensor([1]), torch.tensor([[0.6, 0.5, 0.4, 0.4]], dtype=torch.float64), (10, 10))
    match = Matches(*(torch.tensor([0]) for _ in range(3)))
    criterion = SetCriterion(matcher=HungarianMatcher(), iou_aware=True, weight_class=1.0)
    losses = criterion([Predictions(logits, boxes, Assignment(matches=match))], [target])
    p, quality = logits.detach().sigmoid(), 0.3 / 0.5
    negatives = [(0, 0), (1, 0), (1, 1)]
    wanted = sum(0.75 * p[0][at] ** 2 * -(1 - p[0][at]).log() for at in negatives)
    wanted = wanted - quality * (quality * p[0, 0, 1].log() + (1 - quality) * (1 - p[0, 0, 1]).log())
    assert_close(losses["loss_class"].detach(), wanted)
    positive = torch.zeros_like(logits, dtype=torch.bool)
    positive[0, 0, 1] = True
    loss = iou_aware_focal_loss(logits, positive * quality, positive, 0.25, 2.0)
    (gradient,) = torch.autograd.grad(loss, logits)  # none through the weights
    assert_close(gradient[0, 0, 1], quality * (p[0, 0, 1] - quality))
    assert_close(gradient[0, 1, 0], 0.75 * p[0, 1, 0] ** 3)


def test_iou():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert_close(iou(a, b), torch.tensor([1 / 3, 0.0]))


def test_a_block_is_one_convolution_in_evaluation():
    torch.manual_seed(0)
    block = FusionBlock(16, 4, "BN").double()
    x = torch.randn(2, 16, 7, 9).double() + 1
    for _ in range(3):
        block(x, None)  # statistics
    block.eval()
    branches = block.conv1[1](block.conv1[0](x)) + block.conv2[1](block.conv2[0](x))
    assert_close(block(x, None), block.se_module(F.silu(branches), None) + x)


def test_the_neck_does_not_see_padding_if_it_is_asked_not_to():
    torch.manual_seed(0)
    neck = FusionNeck(embed_dim=32, mask_padding=True).double().eval()
    model = salience().double()
    inside = []
    for (h, w), rows, columns in zip(SHAPES, (5, 3, 2, 1), (9, 5, 3, 2)):  # strides double
        inside.append(torch.ones(1, h, w, dtype=torch.bool))
        inside[-1][:, :rows, :columns] = False
    tokens = model.transformer.tokenize(feature_maps(), inside)
    other = tokens.features.masked_fill(tokens.mask[..., None], 7.0)
    first, second = (neck(x, tokens)[~tokens.mask] for x in (tokens.features, other))
    assert_close(first, second)
    neck.mask_padding = False
    assert (neck(tokens.features, tokens) - neck(other, tokens))[~tokens.mask].abs().max() > 1e-3


def test_any_model_may_have_the_parts():
    config = shrink(get_config("deformable_detr/deformable_detr_r50_two_stage_50ep").model)
    config.transformer.fusion = get_config("encoders/salience.py").fusion
    config.transformer.query_selection.nms_threshold = 0.3
    config.criterion.iou_aware = True
    model = instantiate(config).train()
    losses = model([sample(96, 90), sample(64, 120, seed=2)])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.transformer.fusion.parameters())


# ------------------------------------------------------------------------------- published weights


def test_settings_and_the_order_of_alpha_in_a_published_file():
    """Names and shapes of whole files are in the parity cases."""
    model = salience()
    published = {
        "transformer.encoder.background_embedding.row_embed.weight": torch.ones(200, 16),
        "transformer.alpha": torch.tensor([1.0, 2.0, 3.0]),
        "transformer.level_filter_ratio": torch.tensor([0.25, 0.5, 1.0, 1.0]),
        "transformer.layer_filter_ratio": torch.tensor(model.transformer.encoder.layer_ratios),
        "_classes_": torch.zeros(7, dtype=torch.int64),
        "position_embedding.dim_tx": torch.ones(16),
        "backbone.bn1.num_batches_tracked": torch.tensor(3),
        "transformer.neck.pan_blocks.0.conv1.1.num_batches_tracked": torch.tensor(3),
    }
    converted, report = convert_state_dict(published, model)
    assert converted["transformer.encoder.foreground.alpha"].tolist() == [3.0, 2.0, 1.0]
    assert converted["transformer.fusion.pan_blocks.0.conv1.1.num_batches_tracked"] == 3
    assert len(converted) == 3 and not report.unexpected
    (note,) = report.notes
    assert "level_ratios=[0.4, 0.8, 1.0, 1.0] comes from the config" in note and "0.25, 0.5" in note


def test_torchvisions_swin_is_the_authors():
    """The same function and, by other names, the same weights; without detectron2's norms behind stages."""
    sizes = dict(depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
    torch.manual_seed(0)
    ours = build_swin(embed_dim=16, window_size=4, drop_path_rate=0.0, **sizes).eval()
    model = torch.nn.Module()
    parts = instantiate(
        {
            **get_config("models/backbones.py").torchvision_swin_large.backbone.model,
            **sizes,
            "embed_dim": 16,
            "window_size": [4, 4],
        }
    )
    model.backbone = StagedBackbone(model=parts, channels=[16, 32, 64, 128], channels_last=True).eval()
    named = backbone_names(ours.state_dict(), model)
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not unexpected and all(name.endswith("relative_position_index") for name in missing)
    for name, norm in ours.named_children():
        if name.startswith("norm"):
            norm.eval()
    x = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        maps = model.backbone(x)
        for name, expected in ours(x).items():
            norm = getattr(ours, f"norm{name[1]}")
            found = norm(maps[name].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert model.backbone.output_shape()[name].channels == found.shape[1]
    assert not any(p.requires_grad for p in model.backbone.features[:3].parameters())
    assert all(p.requires_grad for p in model.backbone.features[3:].parameters())
