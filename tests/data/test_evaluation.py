"""faster-coco-eval gives the official numbers."""

import contextlib
import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparse_detr.data import FastCOCOEvaluator

SIZE = 640


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """40 images with objects of all sizes, crowds and images without any; noisy detections of them,
    with wrong classes, duplicates, equal scores and boxes from nowhere."""
    random = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(1, 41):
        for _ in range(random.integers(0, 9)):
            size = np.exp(random.uniform(np.log(8), np.log(300), 2))
            box = [*(random.uniform(0, 1, 2) * (SIZE - size)), *size]
            category = int(random.choice([1, 3, 7]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [float(x) for x in box],
                    "area": float(size.prod() * 0.8),
                    "iscrowd": int(random.random() < 0.05),
                }
            )
            for _ in range(random.integers(0, 4)):
                near = np.array(box) + random.normal(0, 0.08, 4) * np.tile(size, 2)
                wrong = random.random() < 0.2
                detections.append((image, 5 if wrong else category, near, random.random()))
        for _ in range(4):
            box = [*random.uniform(0, 500, 2), *random.uniform(2, 140, 2)]
            detections.append((image, int(random.choice([1, 3, 5, 7])), np.array(box), 0.5))
    content = {
        "images": [{"id": i, "width": SIZE, "height": SIZE, "file_name": f"{i}.jpg"} for i in range(1, 41)],
        "categories": [{"id": i, "name": f"class {i}"} for i in (1, 3, 5, 7, 9)],
        "annotations": annotations,
    }
    path = tmp_path_factory.mktemp("coco") / "instances.json"
    path.write_text(json.dumps(content))
    load_coco_json(str(path), str(path.parent), "fast_eval_test")
    MetadataCatalog.get("fast_eval_test").set(json_file=str(path), image_root=str(path.parent))
    return str(path), detections


def results(detections, **kwargs):
    evaluator = FastCOCOEvaluator("fast_eval_test", **kwargs)
    evaluator.reset()
    contiguous = {1: 0, 3: 1, 5: 2, 7: 3, 9: 4}
    for image in range(1, 41):
        found = [d for d in detections if d[0] == image]
        instances = Instances((SIZE, SIZE))
        corners = [[*box[:2], *(box[:2] + box[2:])] for *_, box, _ in found]
        instances.pred_boxes = Boxes(torch.tensor(np.array(corners).reshape(-1, 4)))
        instances.scores = torch.tensor([score for *_, score in found])
        instances.pred_classes = torch.tensor([contiguous[c] for _, c, *_ in found]).long()
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = evaluator.evaluate()["bbox"]
    return found, printed.getvalue()


def test_all_numbers_are_the_official_ones(scene):
    pytest.importorskip("faster_coco_eval")
    from faster_coco_eval import COCOeval_faster

    path, detections = scene
    rows = [
        {"image_id": i, "category_id": c, "bbox": box.tolist(), "score": float(score)}
        for i, c, box, score in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        stats = []
        for implementation in (COCOeval, COCOeval_faster):
            evaluation = implementation(truth, truth.loadRes(rows), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats.append(np.asarray(evaluation.stats[:12], dtype=float))
    assert ((stats[0] > 0.1) & (stats[0] < 0.9)).all()  # nothing trivial
    np.testing.assert_allclose(stats[1], stats[0], rtol=0, atol=1e-12)


def test_the_evaluator_reports_the_same_either_way(scene):
    pytest.importorskip("faster_coco_eval")
    official, table = results(scene[1], fast=False)
    automatic, faster_table = results(scene[1])
    assert official.keys() == automatic.keys() and len(official) == 11  # six and five classes
    assert automatic == pytest.approx(official, rel=0, abs=1e-10, nan_ok=True)
    lines = [line.strip() for line in table.splitlines() if "IoU=" in line]
    assert lines == [line.strip() for line in faster_table.splitlines() if "IoU=" in line][:12]


def test_it_is_optional(scene, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs faster-coco-eval.*pip install faster-coco-eval"):
        FastCOCOEvaluator("fast_eval_test", fast=True)
    found, _ = results(scene[1])
    assert found["AP"] > 10
