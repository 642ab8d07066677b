"""Boxes, matching and the set criterion."""

import itertools

import pytest
import torch
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from sparse_detr.modeling.boxes import cxcywh_to_xyxy, giou, pairwise_giou, xyxy_to_cxcywh
from sparse_detr.modeling.criterion import Predictions, SetCriterion
from sparse_detr.modeling.matcher import Assignment, HungarianMatcher, Matches, Target


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(*shape, 2, generator=generator, dtype=torch.double) * 0.6 + 0.2
    size = torch.rand(*shape, 2, generator=generator, dtype=torch.double) * 0.3 + 0.05
    return torch.cat([centre, size], -1)


def make_targets(*counts, num_classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        Target(
            torch.randint(num_classes, (n,), generator=generator), random_boxes(n, seed=seed + i), (100, 100)
        )
        for i, n in enumerate(counts)
    ]


def test_box_formats_round_trip():
    boxes = random_boxes(5)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)


def test_giou_agrees_with_torchvision():
    a, b = cxcywh_to_xyxy(random_boxes(6)), cxcywh_to_xyxy(random_boxes(9, seed=5))
    torch.testing.assert_close(pairwise_giou(a, b), generalized_box_iou(a, b))
    torch.testing.assert_close(giou(a, b[:6]), generalized_box_iou(a, b[:6]).diag())


def test_giou_with_eps_is_finite_for_boxes_without_area():
    point = torch.zeros(1, 4)
    assert giou(point, point, eps=1e-6).isfinite().all()


def test_matcher_finds_the_cheapest_assignment():
    matcher = HungarianMatcher()
    targets = make_targets(3, 0, 2)
    logits, boxes = torch.randn(3, 5, 4, dtype=torch.double), random_boxes(3, 5, seed=9)
    (match,) = matcher([(logits, boxes, targets)], [""])
    costs = matcher.costs(logits, boxes, targets)
    start = 0
    for image, cost in enumerate(costs):
        mine = match.batch == image
        found = cost[match.query[mine], match.target[mine] - start].sum()
        best = min(
            (
                sum(cost[q, g] for g, q in enumerate(p))
                for p in itertools.permutations(range(5), cost.shape[1])
            ),
            default=torch.zeros(()),
        )
        torch.testing.assert_close(found, torch.as_tensor(best, dtype=found.dtype))
        start += cost.shape[1]
    assert len(match.query) == 5


def test_matching_sets_together_equals_matching_them_one_by_one():
    matcher, targets = HungarianMatcher(), make_targets(2, 3)
    sets = [(torch.randn(2, 6, 4), random_boxes(2, 6, seed=s).float(), targets) for s in (1, 2, 3)]
    for together, prediction in zip(matcher(sets, ["a", "b", "c"]), sets):
        (alone,) = matcher([prediction], [""])
        assert torch.equal(together.query, alone.query)
        assert torch.equal(together.target, alone.target)


def test_matcher_names_set_and_image_of_a_nan():
    boxes = random_boxes(2, 5)
    boxes[1, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="losses loss_\\*_enc_0, image 1"):
        HungarianMatcher()([(torch.randn(2, 5, 4), boxes, make_targets(2, 2))], ["loss_*_enc_0"])


def reference_losses(logits, boxes, targets, matches):
    """The three losses spelled out, one prediction at a time."""
    labels = torch.cat([t.labels for t in targets])
    wanted = torch.cat([t.boxes for t in targets])
    one_hot = torch.zeros_like(logits)
    l1 = overlap = 0.0
    for b, q, g in zip(matches.batch, matches.query, matches.target):
        one_hot[b, q, labels[g]] = 1
        l1 = l1 + (boxes[b, q] - wanted[g]).abs().sum()
        overlap = (
            overlap
            + 1
            - generalized_box_iou(cxcywh_to_xyxy(boxes[b, q][None]), cxcywh_to_xyxy(wanted[g][None]))[0, 0]
        )
    n = max(1, len(labels))
    focal = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2, reduction="sum")
    return focal / n, l1 / n, overlap / n


def test_criterion_computes_the_set_loss():
    criterion = SetCriterion(matcher=HungarianMatcher())
    targets = make_targets(3, 1)
    prediction = Predictions(torch.randn(2, 6, 4, dtype=torch.double), random_boxes(2, 6, seed=3))
    losses = criterion([prediction], targets)
    (match,) = criterion.match([prediction], targets)
    expected = reference_losses(prediction.logits, prediction.boxes, targets, match)
    torch.testing.assert_close(losses["loss_class"], 2 * expected[0])
    torch.testing.assert_close(losses["loss_bbox"], 5 * expected[1])
    torch.testing.assert_close(losses["loss_giou"], 2 * expected[2])


def test_losses_do_not_depend_on_the_order_of_queries_or_images():
    criterion = SetCriterion(matcher=HungarianMatcher())
    targets = make_targets(3, 2)
    logits, boxes = torch.randn(2, 7, 4, dtype=torch.double), random_boxes(2, 7, seed=4)
    losses = criterion([Predictions(logits, boxes)], targets)
    order = torch.randperm(7)
    shuffled = criterion([Predictions(logits[:, order], boxes[:, order])], targets)
    swapped = criterion([Predictions(logits.flip(0), boxes.flip(0))], targets[::-1])
    for name, value in losses.items():
        torch.testing.assert_close(shuffled[name], value)
        torch.testing.assert_close(swapped[name], value)


def test_images_without_objects_teach_background_and_keep_the_graph():
    criterion = SetCriterion(matcher=HungarianMatcher())
    logits = torch.randn(2, 5, 4, requires_grad=True)
    boxes = random_boxes(2, 5).float().requires_grad_()
    losses = criterion([Predictions(logits, boxes)], make_targets(0, 0))
    assert losses["loss_class"] > 0 and losses["loss_bbox"] == 0 and losses["loss_giou"] == 0
    sum(losses.values()).backward()
    assert logits.grad.abs().sum() > 0
    assert boxes.grad is not None and not boxes.grad.any()


def test_prediction_sets_differ_in_how_objects_are_assigned():
    criterion = SetCriterion(matcher=HungarianMatcher())
    targets = make_targets(2, 1)
    logits, boxes = torch.randn(2, 9, 4), random_boxes(2, 9).float()
    sets = [
        Predictions(logits, boxes, Assignment("_enc", class_agnostic=True)),
        Predictions(logits, boxes, Assignment("_many", repeat=3, weight=0.5)),
        Predictions(
            logits,
            boxes,
            Assignment(
                "_dn",
                normalizer=4.0,
                matches=Matches(*(torch.tensor(x) for x in ([0, 1], [4, 2], [1, 2]))),
            ),
        ),
    ]
    one, many, known = criterion.match(sets, targets)
    assert len(one.query) == 3 and len(many.query) == 9 and known is sets[2].assignment.matches
    losses = criterion(sets, targets)
    assert set(losses) == {f"loss_{k}{s.assignment.suffix}" for k in ("class", "bbox", "giou") for s in sets}
    labels = [Target(torch.zeros_like(t.labels), t.boxes, t.size) for t in targets]
    expected = reference_losses(logits, boxes, labels, one)[0]
    torch.testing.assert_close(losses["loss_class_enc"], 2 * expected)
    boxes_of = torch.cat([t.boxes for t in targets]).float()
    l1 = (boxes[0, 4] - boxes_of[1]).abs().sum() + (boxes[1, 2] - boxes_of[2]).abs().sum()
    torch.testing.assert_close(losses["loss_bbox_dn"], 5 * l1 / (3 * 4))
