"""Contrastive denoising: where the queries go, what they look like, who sees whom."""

import pytest
import torch
from torch.testing import assert_close

from sparse_detr.modeling import ContrastiveDenoising
from sparse_detr.modeling.boxes import cxcywh_to_xyxy
from sparse_detr.modeling.denoising import Noise
from sparse_detr.modeling.matcher import Assignment, Target
from sparse_detr.modeling.proposals import Queries, QueryGroup

DIM, CLASSES, DETECTIONS = 8, 5, 6


def make(**kwargs):
    return ContrastiveDenoising(embed_dim=DIM, num_classes=CLASSES, **kwargs)


def objects(*counts, seed=0):
    """Targets with that many boxes, all well inside the image."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        centre = torch.rand(count, 2, generator=generator) * 0.2 + 0.4
        size = torch.rand(count, 2, generator=generator) * 0.2 + 0.1
        labels = torch.randint(CLASSES, (count,), generator=generator)
        targets.append(Target(labels, torch.cat([centre, size], 1), (100, 100)))
    return targets


def detection_queries(batch, device="cpu", **kwargs):
    content = torch.randn(batch, DETECTIONS, DIM, device=device)
    reference = torch.rand(batch, DETECTIONS, 4, device=device)
    return Queries(content, None, reference, [QueryGroup(DETECTIONS, Assignment())], **kwargs)


@pytest.mark.parametrize(
    ("flavour", "num_queries", "most", "groups"),
    [
        ("detrex", 100, 7, 14),
        ("detrex", 100, 200, 1),  # never none while there is an object
        ("detrex", 20, 4, 5),
        ("official", 100, 7, 14),
        ("official", 100, 200, 1),
        ("official", 50, 7, 7),
        ("official", 20, 4, 40),  # small numbers count groups, whatever the number of objects
        ("detrex", 100, 0, 0),
        ("official", 20, 0, 0),
        ("detrex", 0, 7, 0),
    ],
)
def test_number_of_groups(flavour, num_queries, most, groups):
    assert make(flavour=flavour, num_queries=num_queries).num_groups(most) == groups


def test_official_label_table_has_a_row_that_is_never_drawn():
    denoising = make(flavour="official", label_noise_ratio=2.0)
    assert denoising.label_embed.num_embeddings == CLASSES + 1
    assert make().label_embed.num_embeddings == CLASSES
    assert int(denoising.draw(10_000, torch.zeros(1)).label.max()) == CLASSES - 1


def test_without_noise_every_match_is_the_object_itself():
    targets = objects(3, 0, 2)
    denoising = make(num_queries=9, label_noise_ratio=0.0, box_noise_scale=0.0)
    queries = detection_queries(3)
    out = denoising(queries, targets)
    group = out.groups[0]
    assert (group.size, group.assignment.suffix, group.assignment.normalizer) == (2 * 3 * 3, "_dn", 3)
    assert out.groups[1:] == queries.groups
    assert_close(out.content[:, group.size :], queries.content)
    assert_close(out.reference[:, group.size :], queries.reference)

    matches = group.assignment.matches
    assert len(matches.query) == 3 * 5  # every object once per group
    labels = torch.cat([t.labels for t in targets])[matches.target]
    boxes = torch.cat([t.boxes for t in targets])[matches.target]
    assert_close(out.reference[matches.batch, matches.query], boxes)
    assert_close(out.content[matches.batch, matches.query], denoising.label_embed(labels))
    # positives come first in each group of 2 * 3 queries
    assert set((matches.query % 6).tolist()) == {0, 1, 2}
    # the image without objects has only unused queries
    assert (out.content[1, :18] == 0).all() and (out.reference[1, :18] == 0.5).all()


def test_positives_stay_near_and_negatives_go_further():
    (target,) = targets = objects(4)
    denoising = make(num_queries=400, box_noise_scale=1.0)
    group = (out := denoising(detection_queries(1), targets)).groups[0]
    boxes = cxcywh_to_xyxy(out.reference[0, : group.size]).view(100, 2, 4, 4)  # group, kind, box
    half = target.boxes[:, 2:].repeat(1, 2) / 2
    moved = (boxes - cxcywh_to_xyxy(target.boxes)).abs() / half
    assert moved[:, 0].max() < 1 + 1e-4
    assert moved[:, 0].mean() == pytest.approx(0.5, abs=0.03)
    # where both corners of a negative keep their order, each moved by 1 to 2 half sides
    width, height = (boxes[:, 1, :, 2:] - boxes[:, 1, :, :2]).unbind(-1)
    kept = moved[:, 1][(width > 0.01) & (height > 0.01)]
    assert kept.min() > 1 - 1e-4 and kept.max() < 2 + 1e-4


def test_half_of_the_noise_ratio_of_the_labels_is_redrawn():
    targets = [Target(torch.zeros(50, dtype=torch.long), torch.full((50, 4), 0.5), (10, 10))]
    denoising = make(num_queries=5000, label_noise_ratio=0.5)
    out = denoising(detection_queries(1), targets)
    same = (out.content[0, :10_000] == denoising.label_embed.weight[0]).all(-1).float().mean()
    assert float(same) == pytest.approx(1 - 0.25 * (CLASSES - 1) / CLASSES, abs=0.02)


def test_given_draws_decide_everything():
    (target,) = targets = objects(1)
    denoising = make(num_queries=1, box_noise_scale=0.5)
    noise = Noise(
        label_chance=torch.tensor([0.2, 0.3]),
        label=torch.tensor([4, 4]),
        box_sign=torch.tensor([[1, 1, 1, 1], [-1, 1, 1, -1]]),
        box_part=torch.full((2, 4), 0.4),
    )
    denoising.draw = lambda rows, like: noise
    out = denoising(detection_queries(1), targets)
    assert_close(
        out.content[0, :2], denoising.label_embed(torch.stack([torch.tensor(4), target.labels[0]]))
    )  # 0.2 is below 0.5 / 2, 0.3 is not
    x1, y1, x2, y2 = cxcywh_to_xyxy(target.boxes[0])
    w, h = target.boxes[0, 2:] / 2
    near, far = 0.4 * 0.5, 1.4 * 0.5  # part * scale, of half the box
    wanted = torch.stack(
        [
            torch.stack([x1 + near * w, y1 + near * h, x2 + near * w, y2 + near * h]),
            torch.stack([x1 - far * w, y1 + far * h, x2 + far * w, y2 - far * h]),
        ]
    )
    assert_close(cxcywh_to_xyxy(out.reference[0, :2]), wanted)


def test_boxes_are_clamped_and_bounded_in_logit_space():
    target = Target(torch.tensor([0]), torch.tensor([[0.99, 0.5, 0.02, 0.02]]), (10, 10))
    denoising = make(num_queries=200, box_noise_scale=3.0)
    reference = denoising(detection_queries(1), [target]).reference[0, :400]
    assert reference.min() > 9.98e-4 and reference.max() < 1 - 9.98e-4
    # a negative whose corners swapped has the smallest size there is, not a negative one
    assert (reference[:, 2] < 1.001e-3).any()


def test_a_group_sees_itself_and_the_detections_which_see_no_group():
    own = torch.zeros(DETECTIONS, DETECTIONS, dtype=torch.bool)
    own[0, 1:] = True
    mask = make(num_queries=9)(detection_queries(2, attn_mask=own), objects(3, 1)).attn_mask
    size, per_group = 18, 6
    for row in range(size + DETECTIONS):
        for column in range(size + DETECTIONS):
            if column >= size:
                blocked = row >= size and bool(own[row - size, column - size])
            else:
                blocked = row >= size or row // per_group != column // per_group
            assert bool(mask[row, column]) == blocked, (row, column)


def test_without_objects_the_graph_stays_the_same():
    """Losses of denoising become 0 and its embedding gets a gradient of 0, on every process."""
    denoising = make()
    queries = detection_queries(2)
    out = denoising(queries, objects(0, 0))
    assert out.groups[0].size == 0 and out.groups[0].assignment.suffix == "_dn"
    assert out.groups[0].assignment.normalizer == 1 and out.attn_mask is None
    assert torch.equal(out.content, queries.content)
    out.content.sum().backward()
    assert (denoising.label_embed.weight.grad == 0).all()


@pytest.mark.parametrize("counts", [(0,), (1,), (0, 200), (3, 1, 2)])
def test_no_step_needs_the_values_of_a_tensor(counts):
    """On the meta device there are none; on a GPU nothing waits for them."""
    targets = [Target(t.labels.to("meta"), t.boxes.to("meta"), t.size) for t in objects(*counts)]
    denoising = make().to("meta")
    out = denoising(detection_queries(len(counts), device="meta"), targets)
    groups = denoising.num_groups(max(counts))
    assert out.content.shape == (len(counts), 2 * groups * max(counts) + DETECTIONS, DIM)
    assert out.reference.shape[:2] == out.content.shape[:2]
    assert len(out.groups[0].assignment.matches.query) == groups * sum(counts)


def test_an_unknown_flavour_is_refused():
    with pytest.raises(ValueError, match="flavour='dn' is not one of detrex, official"):
        make(flavour="dn")


def test_queries_with_fixed_positions_are_refused():
    queries = detection_queries(1)
    queries.position = torch.zeros_like(queries.content)
    with pytest.raises(ValueError, match="position_from_reference=True"):
        make()(queries, objects(1))
