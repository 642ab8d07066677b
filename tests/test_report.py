"""The page on runs: its numbers against detections made by hand, and runs in every state."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from detectron2.config import LazyConfig

from sparse_detr import cli
from sparse_detr.config import load_config
from sparse_detr.data import generate_shapes
from sparse_detr.errors import UserError
from sparse_detr.report import write_page
from sparse_detr.report.detections import RESULTS, read_detections
from sparse_detr.report.run import loss_keys, read_runs

from .test_train_net import TINY


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    generate_shapes(str(root), "val", num_images=6)
    return root


@pytest.fixture
def truth(data):
    return json.loads((data / "val.json").read_text())


def make_run(folder, data, detections=None, overrides=()):
    """A run's folder; ``detections``: what its evaluation has written."""
    folder.mkdir()
    options = [f"data.root={data}", f"train.output_dir={folder}", "dataloader.test.dataset.num_images=6"]
    LazyConfig.save(load_config(TINY, [*options, *overrides]), str(folder / "config.yaml"))
    rows = [
        {"iteration": i, "total_loss": 9.0 - i, "loss_bbox": 2.0, "loss_bbox_0": 3.0, "lr": 1e-4}
        for i in range(4)
    ]
    rows.append({"iteration": 4, "bbox/AP": 41.0, "bbox/AP50": 70.0})
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)) + '\n{"iteration": 5, "tot')
    if detections is not None:
        (folder / RESULTS).parent.mkdir()
        (folder / RESULTS).write_text(json.dumps(detections))
    return folder


def perfect(truth):
    keys = ("image_id", "category_id", "bbox")
    return [{**{key: a[key] for key in keys}, "score": 0.9} for a in truth["annotations"]]


def test_errors_are_counted_where_they_were_made(data, truth, tmp_path):
    """One object missed, one of another class, one detection of nothing, one below the threshold."""
    detections = perfect(truth)
    missed = detections.pop(0)
    wrong = detections[-1]
    true_class, wrong["category_id"] = wrong["category_id"], wrong["category_id"] % 5 + 1
    corner = {**missed, "bbox": [0, 0, 3, 3], "score": 0.6}
    detections += [corner, {**corner, "score": 0.1}]
    (run,) = read_runs([make_run(tmp_path / "run", data, detections)])
    found = read_detections(run, 0.4)

    expected = np.zeros((6, 6), int)
    for detection in detections[:-3]:
        expected[detection["category_id"] - 1, detection["category_id"] - 1] += 1
    expected[true_class - 1, wrong["category_id"] - 1] += 1
    expected[missed["category_id"] - 1, 5] += 1
    expected[5, missed["category_id"] - 1] += 1
    assert (found.confusion == expected).all()
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    worst = {image.file_name.split("/")[-1]: str(image) for image in found.images if image.severity[0]}
    if missed["image_id"] == wrong["image_id"]:
        assert worst == {names[missed["image_id"]]: "1 missed, 1 false, 1 wrong class"}
    else:
        assert list(worst.items()) == [
            (names[missed["image_id"]], "1 missed, 1 false"),
            (names[wrong["image_id"]], "1 wrong class"),
        ]


def test_numbers_are_cocos(data, truth, tmp_path):
    (run,) = read_runs([make_run(tmp_path / "run", data, perfect(truth))])
    found = read_detections(run, 0.4)
    counts = [sum(a["category_id"] == k for a in truth["annotations"]) for k in range(1, 6)]
    assert found.objects.tolist() == counts
    for column in ("AP", "AP50", "AP75", "AR"):
        values = found.numbers[column]
        assert values[np.isfinite(values)] == pytest.approx(100) and np.isnan(values).tolist() == [
            count == 0 for count in counts
        ]
    small = [
        k
        for k in range(5)
        if any(a["category_id"] == k + 1 and a["area"] < 32**2 for a in truth["annotations"])
    ]
    assert np.flatnonzero(np.isfinite(found.numbers["APs"])).tolist() == small
    assert not any(image.severity[0] for image in found.images)


def test_a_page_needs_no_other_file_and_compares_runs(data, truth, tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name, data, perfect(truth)[1:]) for name in ("first", "<b>second")]
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, runs), "--pictures", str(tmp_path / "pictures")])
    with pytest.raises(SystemExit, match="^None$|^0$|^$"):
        cli.run("plot")
    page = (runs[0] / "report.html").read_text()
    assert f"{runs[0] / 'report.html'}: " in capsys.readouterr().out
    assert "&lt;b&gt;second" in page and "<b>second" not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(re.match(r"data:image/(png|jpeg);base64,", source) for source in sources)
    assert page.count("1 missed") == 2 and "AP by class" in page
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"losses.png", "ap.png", "1_confusion.png", "1_precision_recall.png", "1_errors_00.jpg"} <= drawn
    assert len(drawn) == len(sources)


def test_runs_in_every_state_have_a_page(data, truth, tmp_path):
    interrupted = make_run(tmp_path / "interrupted", data)
    (begun := tmp_path / "begun").mkdir()
    shutil.copy(interrupted / "config.yaml", begun)
    nothing = make_run(tmp_path / "nothing", data, [])  # evaluated: no detection
    torn = make_run(tmp_path / "torn", data, [])
    (torn / RESULTS).write_text('[{"image_id"')
    elsewhere = make_run(tmp_path / "elsewhere", data, [], ["data.root=no_such_folder"])
    folders = [interrupted, begun, nothing, torn, elsewhere]
    missing = write_page(folders, tmp_path / "page.html", num_images=0)
    assert [reason.split(":")[0] for reason in missing] == ["interrupted", "begun", "torn", "elsewhere"]
    assert "not evaluated yet" in missing[0] and "not a whole JSON file" in missing[2]
    assert "its data are not in no_such_folder" in missing[3] and not (tmp_path / "no_such_folder").exists()
    assert write_page([elsewhere], tmp_path / "page.html", overrides=[f"data.root={data}"]) == []
    assert write_page([begun], tmp_path / "page.html")  # without a single number
    assert "Nothing was noted in metrics.json yet" in (tmp_path / "page.html").read_text()


def test_one_class(data, truth, tmp_path):
    only = [a for a in truth["annotations"] if a["category_id"] == 1]
    (tmp_path / "data").mkdir()
    shutil.copytree(data / "val", tmp_path / "data" / "val")
    content = {**truth, "categories": truth["categories"][:1], "annotations": only}
    (tmp_path / "one.json").write_text(json.dumps(content))
    run = make_run(tmp_path / "run", data, perfect(content))
    text = (run / "config.yaml").read_text()
    start = text.index("dataset:", text.index("  test:"))
    dataset = (
        "dataset: {_target_: sparse_detr.data.coco_dataset, names: test_report_one, "
        f"json_file: {tmp_path / 'one.json'}, image_root: {data / 'val'}}}"
    )
    (run / "config.yaml").write_text(text[:start] + dataset + text[text.index("\n    mapper:", start) :])
    assert write_page([run], tmp_path / "page.html") == []
    assert "<tr><td>disc</td>" in (tmp_path / "page.html").read_text()


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such folder; pass the output folder of a run"):
        read_runs([tmp_path / "none"])
    with pytest.raises(UserError, match="neither metrics.json nor config.yaml"):
        read_runs([tmp_path])


def test_curves_are_those_of_the_log(data, tmp_path):
    runs = read_runs([make_run(tmp_path / name, data) for name in ("a", "b")])
    assert [run.name for run in runs] == ["a", "b"] and loss_keys(runs) == ["total_loss", "loss_bbox"]
    assert runs[0].curve("total_loss") == ([0, 1, 2, 3], [9.0, 8.0, 7.0, 6.0])
    assert runs[0].last("bbox/AP") == 41.0 and runs[0].last("bbox/AR") is None
    assert runs[0].progress == "4 iterations, not finished"  # the config counts in epochs
