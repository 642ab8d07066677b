"""The Shapes data set: reproducible, valid COCO, and a real detection task."""

import colorsys
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparse_detr.data.synthetic import CLASSES, HUES, draw_image, generate_shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate_shapes(root, "train", seed=3, num_images=60)
    return root


def contents(root: Path, split: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((root / split).iterdir())}


def test_the_same_seed_gives_the_same_bytes(root, tmp_path):
    generate_shapes(tmp_path, "train", seed=3, num_images=60)
    assert (tmp_path / "train.json").read_bytes() == (root / "train.json").read_bytes()
    assert contents(tmp_path, "train") == contents(root, "train")


def test_seeds_and_splits_share_no_image(root, tmp_path):
    generate_shapes(tmp_path / "seed", "train", seed=4, num_images=10)
    generate_shapes(tmp_path / "split", "val", seed=3, num_images=10)
    known = set(contents(root, "train").values())
    assert known.isdisjoint(contents(tmp_path / "seed", "train").values())
    assert known.isdisjoint(contents(tmp_path / "split", "val").values())


def test_a_split_is_drawn_once_and_again_when_the_arguments_change(tmp_path):
    generate_shapes(tmp_path, "val", num_images=2)
    picture = tmp_path / "val" / "000000.png"
    picture.write_bytes(b"mine")
    generate_shapes(tmp_path, "val", num_images=2)
    assert picture.read_bytes() == b"mine"
    generate_shapes(tmp_path, "val", num_images=3)
    assert picture.read_bytes() != b"mine"


def test_pycocotools_reads_it_and_ground_truth_scores_one(root, capsys):
    coco = COCO(str(root / "train.json"))
    detections = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in coco.dataset["annotations"]
    ]
    evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_it_holds_what_a_detector_has_to_cope_with(root):
    data = json.loads((root / "train.json").read_text())
    assert [c["name"] for c in data["categories"]] == list(CLASSES)
    assert {a["category_id"] for a in data["annotations"]} == {1, 2, 3, 4, 5}
    sides = [max(a["bbox"][2:]) for a in data["annotations"]]
    assert max(sides) / min(sides) > 10  # sizes over an order of magnitude
    with_objects = {a["image_id"] for a in data["annotations"]}
    assert 0 < len(data["images"]) - len(with_objects) < 0.2 * len(data["images"])
    sizes = {i["id"]: (i["width"], i["height"]) for i in data["images"]}
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        width, height = sizes[a["image_id"]]
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width and y + h <= height


def test_objects_are_vivid_and_so_are_some_things_that_are_none():
    """Saturation finds objects, but not them alone: distractors must be told apart by outline."""

    def saturation(pixels):
        return (pixels.max(-1).astype(float) - pixels.min(-1)) / 255

    inside, outside = [], []
    for index in range(60):
        pixels, objects = draw_image(np.random.RandomState([9, index]))
        covered = np.zeros(pixels.shape[:2], bool)
        for _, mask in objects:
            covered |= mask
        inside += [saturation(pixels[mask]).mean() for _, mask in objects]
        outside.append(np.quantile(saturation(pixels[~covered]), 0.98))
    assert np.median(inside) > 0.4
    assert 0.1 < np.mean(np.array(outside) > 0.4) < 0.7  # images with a vivid distractor


@pytest.mark.parametrize("hues, steps, low, high", [("shared", 3, 0.5, 0.6), ("own", 5, 0.9, 1.0)])
def test_how_often_hue_names_the_class(hues, steps, low, high):
    """By the best rule that looks at the nearest hue alone."""
    counts = np.zeros((len(CLASSES), steps))
    for index in range(80):
        pixels, objects = draw_image(np.random.RandomState([7, index]), HUES[hues])
        for category, mask in objects:
            hue, _, _ = colorsys.rgb_to_hsv(*np.median(pixels[mask], axis=0) / 255)
            counts[category, round(hue * steps) % steps] += 1
    assert low < counts.max(0).sum() / counts.sum() < high


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, val, not 'test'"):
        generate_shapes(tmp_path, "test")
    with pytest.raises(ValueError, match="hues must be one of shared, own, not 'red'"):
        generate_shapes(tmp_path, "val", hues="red")
