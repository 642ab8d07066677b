"""Data of one's own from the command line: classes from the JSON, with and without validation."""

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.engine import default_argument_parser

from sparse_detr import Predictor
from sparse_detr.config import (
    get_config,
    list_configs,
    load_config,
    resolve_classes,
    resolve_config,
    stored_classes,
)
from sparse_detr.data import generate_shapes
from sparse_detr.data.synthetic import CLASSES
from sparse_detr.engine.checks import check_own_data
from sparse_detr.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_net  # noqa: E402

TINY = str(ROOT / "tests" / "engine" / "tiny_own.py")  # two iterations
CUSTOM = [name for name in list_configs() if name.startswith("custom/")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight training and four validation images."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 8), ("val", 4)):
        generate_shapes(str(root), split, num_images=count)
    return root


def files(data, *splits):
    return [
        override
        for split in splits
        for override in (
            f"data.{split}_json={data}/{split}.json",
            f"data.{split}_images={data}/{split}",
        )
    ]


def run(output_dir, *arguments, config=TINY):
    flags = [a for a in arguments if a.startswith("--")]
    overrides = [a for a in arguments if not a.startswith("--")]
    command = ["--config-file", str(config), *flags, f"train.output_dir={output_dir}", *overrides]
    return train_net.main(default_argument_parser().parse_args(command))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, *files(data, "train", "val"))


def test_four_paths_are_all_it_takes(finished):
    folder, results = finished
    assert {f"AP-{name}" for name in CLASSES} <= results["bbox"].keys()
    cfg = load_config(str(folder / "config.yaml"))
    assert cfg.model.num_classes == 5 and cfg.data.classes == list(CLASSES)
    log = (folder / "log.txt").read_text()
    assert "train.json: 8 images" in log and "val.json: 4 images" in log


def test_predictor_knows_the_classes_without_the_data(finished, data, tmp_path):
    folder, _ = finished
    moved = tmp_path / "run"
    shutil.copytree(folder, moved)
    text = (moved / "config.yaml").read_text().replace(str(data), "/nowhere")
    (moved / "config.yaml").write_text(text)
    predict = Predictor(str(moved), device="cpu")
    assert predict.metadata.thing_classes == list(CLASSES)
    assert len(predict(np.zeros((64, 80, 3), np.uint8))["instances"]) > 0


def test_evaluation_needs_no_training_data(finished, data, tmp_path):
    folder, results = finished
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    again = run(
        tmp_path / "a",
        "--eval-only",
        weights,
        "data.train_json=/nowhere.json",
        config=folder / "config.yaml",
    )
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    again = run(tmp_path / "b", "--eval-only", weights, *files(data, "val"))
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)


def test_without_a_validation_set_it_trains_and_says_so(data, tmp_path):
    assert run(tmp_path, *files(data, "train")) == {}
    assert (tmp_path / "model_final.pth").is_file()
    assert "no validation set (data.val_json, data.val_images)" in (tmp_path / "log.txt").read_text()


def test_evaluation_needs_a_validation_set(finished, data, tmp_path):
    folder, _ = finished
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    with pytest.raises(ValueError, match="nothing to evaluate on: pass data.val_json="):
        run(tmp_path, "--eval-only", weights, *files(data, "train"))


def test_half_of_a_data_set_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match="data.val_images=None: pass both"):
        run(tmp_path, *files(data, "train"), f"data.val_json={data}/val.json")


def test_broken_data_stop_before_the_first_step(data, tmp_path):
    coco = json.loads((data / "train.json").read_text())
    coco["annotations"][0]["category_id"] = 99
    (tmp_path / "broken.json").write_text(json.dumps(coco))
    broken = f"data.train_json={tmp_path / 'broken.json'}"
    with pytest.raises(ValueError, match="the data must be mended first:\n.*unknown categories"):
        run(tmp_path / "run", *files(data, "train"), broken)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_class_names_are_no_syntax_and_ids_may_be_texts(data, tmp_path):
    """OmegaConf takes ??? for a missing value and ${...} for a reference."""
    names = ["???", "${train.seed}", "${", '"quoted" \\u003f', "null"]
    for split in ("train", "val"):
        coco = json.loads((data / f"{split}.json").read_text())
        for category, name in zip(coco["categories"], names, strict=True):
            category["name"] = name
            category["id"] = f"c{category['id']}"
        for image in coco["images"]:
            image["id"] = f"i{image['id']}"
        for annotation in coco["annotations"]:
            annotation["id"] = f"a{annotation['id']}"
            annotation["image_id"] = f"i{annotation['image_id']}"
            annotation["category_id"] = f"c{annotation['category_id']}"
        (tmp_path / f"{split}.json").write_text(json.dumps(coco))
    own = [f"data.{split}_json={tmp_path / split}.json" for split in ("train", "val")]
    folder = tmp_path / "run"
    results = run(folder, *files(data, "train", "val"), *own)
    assert {f"AP-{name}" for name in names} <= results["bbox"].keys()
    again = run(
        folder,
        "--eval-only",
        f"train.init_checkpoint={folder / 'model_final.pth'}",
        config=folder / "config.yaml",
    )
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    assert Predictor(str(folder), device="cpu").class_names == names
    assert stored_classes(load_config(str(folder / "config.yaml"))) == names


def test_several_files_are_one_set(data, tmp_path):
    """Training on a list of files; the classes of all are read, and their images have ids of their own."""
    several = [
        f"data.train_json=[{data}/train.json,{data}/val.json]",
        f"data.train_images=[{data}/train,{data}/val]",
    ]
    run(tmp_path, *several, "data.classes=[star,disc]")
    merged = json.loads((tmp_path / "data" / "train.json").read_text())
    assert [c["name"] for c in merged["categories"]] == ["star", "disc"] and len(merged["images"]) == 12
    assert load_config(str(tmp_path)).model.num_classes == 2
    assert Predictor(str(tmp_path), device="cpu").class_names == ["star", "disc"]


def test_evaluation_is_on_the_chosen_classes(finished, data, tmp_path):
    results = run(tmp_path, *files(data, "train", "val"), "data.classes=[cross,disc]")
    assert {key for key in results["bbox"] if key.startswith("AP-")} == {"AP-cross", "AP-disc"}
    counted = json.loads((tmp_path / "data" / "val.json").read_text())
    assert len(counted["images"]) == 4 and {a["category_id"] for a in counted["annotations"]} <= {1, 2}
    log = (tmp_path / "log.txt").read_text()
    assert "data.classes leaves out boxes of 3 other classes" in log


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.classes=[disc,starr]"],
            "data.classes: starr is not among the classes of .*train.json .disc, tri",
        ),
        (["data.classes=disc"], r"write data.classes=\[disc\]"),
        (["data.classes=[disc,disc]"], "has a name twice"),
        (["data.yolo=data.yaml"], "data.yolo=data.yaml and data.train_json=.*two sources of data"),
        (
            ["data.train_json=[a.json,b.json,c.json]", "data.train_images=[a,b]"],
            "3 annotation files .* 2 image",
        ),
    ],
)
def test_contradictory_data_are_refused_before_the_first_step(overrides, message, data, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "run", *files(data, "train"), *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_names_and_limits_as_lists(finished, data, tmp_path):
    folder, results = finished
    evaluation = ["--eval-only", f"train.init_checkpoint={folder / 'model_final.pth'}", *files(data, "val")]
    again = run(
        tmp_path / "a",
        *evaluation,
        "dataloader.test.dataset.names=[custom_val]",
        "dataloader.evaluator.max_dets_per_image=[1,10,100]",
    )
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    run(tmp_path / "b", *evaluation, "dataloader.evaluator.max_dets_per_image=300")
    for key, message in (
        ("dataloader.test.dataset.names=[a,b]", "one JSON file is one data set"),
        ("dataloader.evaluator.max_dets_per_image=[300]", "expected a positive integer"),
        ("dataloader.evaluator.max_dets_per_image=many", "expected a positive integer"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "c", *files(data, "train", "val"), key)
    assert not (tmp_path / "c" / "metrics.json").exists()


def test_the_config_s_limits_are_compared_with_the_data(data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sparse_detr"), "propagate", True)
    cfg = load_config(
        TINY,
        [
            *files(data, "train"),
            "model.max_detections=2",
            "dataloader.evaluator.max_dets_per_image=[1,2,3]",
            "model.transformer.query_selection.num_queries=4",
        ],
    )
    check_own_data(cfg, "train")
    assert (
        "dataloader.evaluator.max_dets_per_image=3, model.max_detections=2, "
        "model.transformer.query_selection.num_queries=4: raise them to "
    ) in caplog.text


def test_a_number_that_is_not_the_files_is_an_error_that_names_both(data, tmp_path):
    with pytest.raises(ValueError, match=r"num_classes=7, but .*train.json has 5 classes \(disc,"):
        run(tmp_path, *files(data, "train", "val"), "model.num_classes=7")


def test_other_classes_than_those_learned_cannot_be_evaluated(finished, data, tmp_path):
    """The same number of classes under other names: AP would be that of a mix-up."""
    folder, _ = finished
    coco = json.loads((data / "val.json").read_text())
    coco["categories"][1]["name"] = "pyramid"
    (tmp_path / "val.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="class 1 is 'pyramid' instead of 'triangle'"):
        run(
            tmp_path / "run",
            "--eval-only",
            f"data.val_json={tmp_path / 'val.json'}",
            f"train.init_checkpoint={folder / 'model_final.pth'}",
            config=folder / "config.yaml",
        )


def with_categories(data, split, path, change):
    coco = json.loads((data / f"{split}.json").read_text())
    change(coco)
    path.write_text(json.dumps(coco))
    return f"data.{split}_json={path}"


def reverse(coco):
    for category, name in zip(coco["categories"], reversed(CLASSES)):
        category["name"] = name


def test_the_order_of_the_classes_comes_with_the_weights(finished, data, tmp_path):
    """Nothing but the checkpoint knows it here: the classes are read from the JSON."""
    folder, _ = finished
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    val = with_categories(data, "val", tmp_path / "val.json", reverse)
    other = "class 0 is 'cross' in the data, 'disc' in the weights .data: cross, star, .*; weights: disc"
    with pytest.raises(ValueError, match=other):
        run(tmp_path / "a", "--eval-only", weights, *files(data, "val"), val)
    train = with_categories(data, "train", tmp_path / "train.json", reverse)
    shutil.copytree(folder, tmp_path / "b")
    with pytest.raises(ValueError, match=other):
        run(tmp_path / "b", "--resume", *files(data, "train"), train)
    run(tmp_path / "c", *files(data, "train"), train, weights)
    log = (tmp_path / "c" / "log.txt").read_text()
    assert "fine-tuning for other classes, or in another order: class 0 is 'cross'" in log


def test_fewer_classes_in_the_validation_set(finished, data, tmp_path):
    """The advice leads somewhere."""
    folder, results = finished
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    absent = {"star", "cross"}

    def drop(coco):
        ids = {c["id"] for c in coco["categories"] if c["name"] in absent}
        coco["categories"] = [c for c in coco["categories"] if c["id"] not in ids]
        coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] not in ids]

    val = with_categories(data, "val", tmp_path / "val.json", drop)
    remedy = r"JSON all the {} categories, in their order \(disc, triangle, square, star, cross\); some may"
    with pytest.raises(ValueError, match=remedy.format("training set's")):
        run(tmp_path / "a", "--eval-only", weights, *files(data, "val"), val)
    with pytest.raises(ValueError, match=remedy.format("model's")):
        run(tmp_path / "b", "--eval-only", weights, val, config=folder / "config.yaml")

    def empty(coco):
        ids = {c["id"] for c in coco["categories"] if c["name"] in absent}
        coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] not in ids]

    val = with_categories(data, "val", tmp_path / "all.json", empty)
    again = run(tmp_path / "c", "--eval-only", weights, *files(data, "val"), val)
    assert again["bbox"]["AP-disc"] == pytest.approx(results["bbox"]["AP-disc"], nan_ok=True)


def test_a_run_goes_on_from_a_model_of_other_classes(finished, data, tmp_path):
    """... when it is trained; evaluation and resuming take the weights as they are."""
    folder, _ = finished
    coco = json.loads((data / "train.json").read_text())
    coco["categories"].append({"id": 6, "name": "hexagon"})
    (tmp_path / "six.json").write_text(json.dumps(coco))
    six = [*files(data, "train"), f"data.train_json={tmp_path / 'six.json'}"]
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    run(tmp_path / "new", *six, weights)
    assert "fine-tuning from 5 to 6 classes" in (tmp_path / "new" / "log.txt").read_text()

    shutil.copytree(folder, tmp_path / "old")
    with pytest.raises(ValueError, match="trained for 5 classes, the model has 6"):
        run(tmp_path / "old", "--resume", *six)


@pytest.mark.parametrize("name", CUSTOM)
def test_the_recipes_leave_the_classes_to_the_data(name, data):
    cfg = get_config(name, files(data, "train"))
    assert cfg.model.num_classes is None
    resolve_classes(cfg)
    assert cfg.model.num_classes == 5
    assert cfg.train.output_dir == f"./output/{name}"
    assert cfg.dataloader.train.total_batch_size == 8


def test_a_file_and_overrides_become_a_config_that_can_be_built(data):
    """By name or as a loaded config, which stays as it is."""
    loaded = get_config(CUSTOM[0])
    for config in (CUSTOM[0], loaded):
        cfg = resolve_config(config, [*files(data, "train"), "train.epochs=3"])
        assert (cfg.model.num_classes, cfg.data.classes, cfg.train.epochs) == (5, list(CLASSES), 3)
    assert loaded.model.num_classes is loaded.data.train_json is None
    with pytest.raises(UserError, match="num_classes is not known"):
        resolve_config(loaded)


def test_nothing_is_guessed_without_data():
    with pytest.raises(ValueError, match="num_classes is not known: pass data.train_json="):
        resolve_classes(get_config(CUSTOM[0]))
    cfg = get_config(CUSTOM[0], ["model.num_classes=4"])
    resolve_classes(cfg)
    assert cfg.model.num_classes == 4
