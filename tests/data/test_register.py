"""Registering data sets, and the checks made before training."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn, tensor

from sparse_detr.data import (
    DetrDatasetMapper,
    check_classes,
    check_datasets,
    coco_dataset,
    register_coco,
)


@pytest.fixture
def files(tmp_path):
    """Two images, three classes whose ids have gaps, one image without objects."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    content = {
        "images": [
            {"id": 11, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 12, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            dict(id=1, image_id=11, category_id=90, bbox=[1, 2, 20, 10], area=200, iscrowd=0),
            dict(id=2, image_id=11, category_id=7, bbox=[5, 5, 30, 20], area=600, iscrowd=0),
        ],
        "categories": [{"id": i, "name": n} for i, n in ((90, "cup"), (2, "cat"), (7, "dog"))],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    return {"json_file": str(tmp_path / "set.json"), "image_root": str(tmp_path)}


@pytest.fixture
def name():
    name = "test_register_set"
    yield name
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_registering_twice_is_the_same_as_once(name, files):
    register_coco(name, **files)
    register_coco(name, **files)
    assert len(DatasetCatalog.get(name)) == 2


def test_other_files_replace_our_own_registration(name, files, tmp_path):
    register_coco(name, **files)
    other = tmp_path / "other"
    other.mkdir()
    register_coco(name, files["json_file"], str(other))
    assert MetadataCatalog.get(name).image_root == str(other)


def test_names_of_others_are_not_taken(files):
    with pytest.raises(ValueError, match="'coco_2017_val' is taken by .*choose another name"):
        register_coco("coco_2017_val", **files)


def test_missing_files_are_named(name, files, tmp_path):
    with pytest.raises(ValueError, match=f"no annotation file {tmp_path}/nowhere.json"):
        register_coco(name, f"{tmp_path}/nowhere.json", files["image_root"])
    with pytest.raises(ValueError, match=f"no image folder {tmp_path}/nowhere"):
        register_coco(name, files["json_file"], f"{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="pass data.train_json="):
        coco_dataset(names=name, json_file=None, image_root=None)


def test_unknown_and_absent_sets_are_explained(name):
    with pytest.raises(ValueError, match="'coco_2017_vall' is not registered.*coco_2017_val"):
        check_datasets("coco_2017_vall")
    register_coco_instances(name, {}, "/none/instances.json", "/none")
    with pytest.raises(ValueError, match="/none/instances.json.*DETECTRON2_DATASETS"):
        check_datasets(name)


def test_images_without_objects_stay(name, files):
    assert [len(r["annotations"]) for r in coco_dataset(names=name, **files)] == [2, 0]
    assert len(coco_dataset(names=name, **files, filter_empty=True)) == 1


def test_the_class_count_must_fit(name, files):
    coco_dataset(names=name, **files)
    check_classes(3, name)
    with pytest.raises(ValueError, match=r"3 classes \(cat, dog, cup\).*pass model.num_classes=3"):
        check_classes(80, name)


def test_the_classes_must_be_those_of_the_model_in_its_order(name, files):
    coco_dataset(names=name, **files)
    check_classes(3, name, expected=["cat", "dog", "cup"])
    with pytest.raises(ValueError, match="class 1 is 'dog' instead of 'cup'"):
        check_classes(3, name, expected=["cat", "cup", "dog"])


def test_gaps_in_category_ids_are_closed_and_restored(name, files):
    """Classes are 0..2 by id for the model; the evaluator maps them back to the JSON's ids."""
    records = coco_dataset(names=name, **files)
    assert [a["category_id"] for a in records[0]["annotations"]] == [2, 1]

    class Oracle(nn.Module):
        def forward(self, batch):
            result = Instances((30, 40))
            result.pred_boxes = Boxes(tensor([[1.0, 2, 21, 12], [5, 5, 35, 25]]))
            result.scores = tensor([0.9, 0.8])
            result.pred_classes = tensor([2, 1])
            return [{"instances": result[: 2 * (x["image_id"] == 11)]} for x in batch]

    loader = build_detection_test_loader(
        records, mapper=DetrDatasetMapper(is_train=False, augmentations=[]), num_workers=0
    )
    results = inference_on_dataset(Oracle(), loader, COCOEvaluator(name, output_dir=None))
    assert results["bbox"]["AP-cup"] == results["bbox"]["AP-dog"] == pytest.approx(100)
