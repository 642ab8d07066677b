"""What the training mapper keeps, drops and clips."""

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from sparse_detr.data import DetrDatasetMapper, train_augmentations
from sparse_detr.data import test_augmentations as inference_augmentations  # pytest would collect it
from sparse_detr.data.loader import seed_everything
from sparse_detr.data.mapper import RandomEither

HEIGHT, WIDTH = 60, 80  # of `record`


def annotation(x, y, w, h, category_id=0, iscrowd=0):
    return {
        "bbox": [x, y, w, h],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category_id,
        "iscrowd": iscrowd,
        "segmentation": [[x, y, x + w, y, x + w, y + h]],
    }


def mapped(record, annotations=None, augmentations=()):
    if annotations is not None:
        record = {**record, "annotations": annotations}
    return DetrDatasetMapper(is_train=True, augmentations=augmentations)(record)


def test_images_without_objects_are_kept(record):
    for annotations in ([], None):
        instances = mapped(record, annotations)["instances"]
        assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.gt_classes.dtype == torch.int64


def test_crowd_regions_are_left_out(record):
    boxes = [annotation(1, 2, 30, 40, 1), annotation(0, 0, 50, 50, 2, iscrowd=1)]
    assert mapped(record, boxes)["instances"].gt_classes.tolist() == [1]


def test_boxes_are_clipped_and_empty_ones_dropped(record):
    boxes = [annotation(70, 50, 40, 40, 3), annotation(10, 10, 0, 5, 4), annotation(90, 5, 9, 9, 5)]
    instances = mapped(record, boxes)["instances"]
    assert instances.gt_classes.tolist() == [3]
    assert instances.gt_boxes.tensor.tolist() == [[70, 50, WIDTH, HEIGHT]]


def test_pixels_are_rgb_or_as_asked(record):
    image = mapped(record, [])["image"]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [255, 0, 0]
    bgr = DetrDatasetMapper(is_train=False, augmentations=[], image_format="BGR")(record)["image"]
    assert bgr[:, 0, 0].tolist() == [0, 0, 255]


def test_boxes_follow_the_flip(record):
    flipped = mapped(record, [annotation(10, 5, 20, 30)], [T.RandomFlip(1.0)])
    assert flipped["instances"].gt_boxes.tensor.tolist() == [[50, 5, 70, 35]]
    assert flipped["image"][:, 0, 0].tolist() == [0, 0, 255]


def test_inference_leaves_annotations_behind(record):
    mapper = DetrDatasetMapper(
        is_train=False, augmentations=inference_augmentations(short_edge=30, max_size=1000)
    )
    entry = mapper({**record, "annotations": [annotation(1, 2, 3, 4)]})
    assert entry["image"].shape == (3, 30, 40)
    assert (entry["height"], entry["width"], entry["image_id"]) == (HEIGHT, WIDTH, 7)
    assert "annotations" not in entry and "instances" not in entry


def test_the_published_recipe_has_two_branches(record):
    """Without a crop the whole image is resized; with one, a part of it fills the same sizes."""
    sizes = dict(short_edges=[48, 64], max_size=100, pre_crop_short_edges=[60], crop_size=[30, 40])
    whole = [annotation(0, 0, WIDTH, HEIGHT)]

    def shapes(crop_prob):
        seed_everything(0)
        augmentations = train_augmentations(**sizes, crop_prob=crop_prob)
        return {tuple(mapped(record, whole, augmentations)["image"].shape[1:]) for _ in range(60)}

    assert shapes(crop_prob=0) == {(48, 64), (64, 85)}
    cropped = shapes(crop_prob=1)
    assert {min(s) for s in cropped} == {48, 64} and len(cropped) > 10  # aspect ratios vary
    assert max(max(s) for s in cropped) <= 100


def test_defaults_are_the_published_sizes():
    flip, either = train_augmentations()
    assert flip.prob == 0.5 and either.prob == 0.5
    first, crop, last = either.first.augs
    assert list(first.short_edge_length) == [400, 500, 600]
    assert crop.crop_type == "absolute_range" and tuple(crop.crop_size) == (384, 600)
    assert list(last.short_edge_length) == list(range(480, 801, 32)) and last.max_size == 1333
    (resize,) = inference_augmentations()
    assert resize.short_edge_length == (800, 800) and resize.max_size == 1333


def test_random_either_takes_each_branch_with_its_probability(record):
    seed_everything(0)
    either = RandomEither([T.Resize((8, 8))], [T.Resize((9, 9))], prob=0.25)
    widths = [mapped(record, [], [either])["image"].shape[-1] for _ in range(200)]
    assert widths.count(8) + widths.count(9) == 200 and 30 < widths.count(8) < 70


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_training_input_is_that_of_detectron2s_mapper(record, image_format):
    """The same pixels and boxes from the same random numbers; only the reading of files is our own."""
    record = {**record, "annotations": [annotation(1, 2, 30, 40, 1), annotation(40, 20, 60, 60, 2)]}
    augmentations = train_augmentations(short_edges=[48, 64], pre_crop_short_edges=[60], crop_size=[30, 40])
    for seed in range(8):
        results = []
        for mapper in (DetrDatasetMapper, DatasetMapper):
            seed_everything(seed)
            options = dict(is_train=True, augmentations=augmentations, image_format=image_format)
            results.append(mapper(**options)(record))
        ours, theirs = results
        assert ours.keys() == theirs.keys() and torch.equal(ours["image"], theirs["image"])
        for field in ("gt_boxes", "gt_classes"):
            first, second = (getattr(r["instances"], field) for r in results)
            assert torch.equal(getattr(first, "tensor", first), getattr(second, "tensor", second))
