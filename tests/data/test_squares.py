"""RT-DETR's augmentation: what torchvision's transforms do, and one size for each batch."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparse_detr.data import DetrDatasetMapper, build_train_loader, square_train_augmentations
from sparse_detr.data import square_test_augmentations as square_inference_augmentations
from sparse_detr.data.loader import seed_everything
from sparse_detr.data.squares import RandomIoUCrop, RandomPhotometricDistort, RandomZoomOut

HEIGHT, WIDTH = 60, 80  # of `record`

BOXES = np.array([[2, 3, 30, 40], [35, 10, 70, 50], [60, 5, 78, 20]], dtype=np.float64)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("ours", "theirs", "unused"),
    [
        (RandomIoUCrop(), v2.RandomIoUCrop(), 0),
        (RandomZoomOut(), v2.RandomZoomOut(p=1.0), 1),  # it draws whether to do anything
        (RandomPhotometricDistort(0.7), v2.RandomPhotometricDistort(p=0.7), 0),
    ],
)
def test_they_are_torchvisions(ours, theirs, unused, image):
    """The same pixels and boxes from the same random numbers; what torchvision marks as lost is empty."""
    lost, shapes = 0, set()
    for seed in range(25):
        torch.manual_seed(seed)
        expected, boxes = theirs(
            tv_tensors.Image(image.transpose(2, 0, 1)),
            tv_tensors.BoundingBoxes(torch.from_numpy(BOXES), format="XYXY", canvas_size=(HEIGHT, WIDTH)),
        )
        torch.manual_seed(seed)
        torch.rand(unused)
        found = T.AugInput(image, boxes=BOXES)
        transform = ours(found)
        assert np.array_equal(found.image, expected.numpy().transpose(1, 2, 0))
        height, width = found.image.shape[:2]
        one_by_one = np.concatenate([transform.apply_box(box[None]) for box in BOXES])
        assert np.allclose(one_by_one.clip(0, [width, height] * 2), boxes.numpy())
        lost += int((boxes[:, 2] == boxes[:, 0]).sum())
        shapes.add((height, width))
    assert (len(shapes) > 10) == (not isinstance(ours, RandomPhotometricDistort))
    assert (lost > 5) == isinstance(ours, RandomIoUCrop)


def test_an_image_without_objects_is_not_cropped(image):
    for boxes in (None, np.zeros((0, 4))):
        assert isinstance(RandomIoUCrop()(T.AugInput(image, boxes=boxes)), T.NoOpTransform)


@pytest.fixture
def records(record):
    """The image eight times, with an object on its left half and a crowd over all."""
    left, everything = [0, 0, WIDTH // 2, HEIGHT], [0, 0, WIDTH, HEIGHT]
    annotations = [
        dict(bbox=box, bbox_mode=BoxMode.XYWH_ABS, category_id=0, iscrowd=int(box is everything))
        for box in (left, everything)
    ]
    return [{**record, "annotations": annotations, "image_id": i} for i in range(8)]


def test_squares(records):
    """Whatever is drawn, the image is a square, and a box lies where its colour does."""
    seed_everything(0)
    mapper = DetrDatasetMapper(is_train=True, augmentations=square_train_augmentations(size=64, color_prob=0))
    kinds = set()
    for _ in range(30):
        entry = mapper(records[0])
        assert entry["image"].shape == (3, 64, 64)
        kinds.add(len(entry["instances"]))
        for x1, y1, x2, y2 in entry["instances"].gt_boxes.tensor.round().int().tolist():
            red, _, blue = entry["image"][:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float()
            assert red.numel() == 0 or (red.mean() > 200 and blue.mean() < 50)
    assert kinds == {1}  # a crop keeps an object
    mapper = DetrDatasetMapper(is_train=False, augmentations=square_inference_augmentations(size=32))
    entry = mapper(records[0])
    assert entry["image"].shape == (3, 32, 32) and (entry["height"], entry["width"]) == (HEIGHT, WIDTH)


def batches(records, count, start_iter=0, num_workers=0):
    augmentations = square_train_augmentations(size=16, sizes=[24, 32, 40, 48])
    mapper = DetrDatasetMapper(is_train=True, augmentations=augmentations)
    loader = build_train_loader(dataset=records, mapper=mapper, total_batch_size=4, num_workers=num_workers)
    loader.batch_sampler.seed, loader.batch_sampler.start_iter = 3, start_iter
    return list(itertools.islice(loader, count))


def same(first, second):
    for a, b in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert a["image_id"] == b["image_id"] and torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


def test_a_batch_has_one_size_which_depends_on_the_iteration_alone(records, monkeypatch):
    whole = batches(records, 9)
    sizes = [{entry["image"].shape[1:] for entry in batch} for batch in whole]
    assert all(len(kinds) == 1 for kinds in sizes) and len(set.union(*sizes)) > 2
    assert {entry["instances"].image_size for entry in whole[0]} == sizes[0]
    assert "batch_seed" not in whole[0][0]
    assert not torch.equal(whole[0][0]["image"], whole[0][1]["image"])  # each with its own augmentation
    same(whole[5:], batches(records, 4, start_iter=5))
    same(whole[:3], batches(records, 3, num_workers=1))
    monkeypatch.setattr("sparse_detr.data.loader.comm.get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("sparse_detr.data.loader.comm.get_rank", lambda rank=rank: rank)
        same([batch[rank::2] for batch in whole[:4]], batches(records, 4))


def test_without_a_batch_each_image_draws_its_size(records):
    mapper = DetrDatasetMapper(
        is_train=True, augmentations=square_train_augmentations(size=16, sizes=[24, 32])
    )
    seed_everything(0)
    assert {mapper(records[0])["image"].shape[-1] for _ in range(12)} == {24, 32}
