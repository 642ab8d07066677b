"""tools/demo.py: what it reads, draws and writes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import LazyConfig
from PIL import Image

import sparse_detr
from sparse_detr.engine import Checkpointer

from .modeling.tiny import shrink

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import demo  # noqa: E402
import demo_quick  # noqa: E402


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The output of a (very short) run on three classes."""
    folder = tmp_path_factory.mktemp("run")
    cfg = sparse_detr.get_config("sparse_detr/sparse_detr_r50_30_50ep")
    shrink(cfg.model)
    cfg.dataloader.test.mapper.augmentations.short_edge = 64
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    checkpointer = Checkpointer(sparse_detr.build_model(cfg, device="cpu"), str(folder))
    checkpointer.class_names = ["cat", "dog", "cow"]
    checkpointer.save("model_final")
    checkpointer.tag_last_checkpoint("model_final.pth")
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a.png", (40, 60, 3)), ("b.jpg", (50, 50, 3))):
        pixels = np.random.default_rng(0).integers(0, 255, size, np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_becomes_pictures_and_coco_json(run_folder, images, tmp_path, capsys):
    found, pictures = tmp_path / "found.json", tmp_path / "pictures"
    arguments = ["--run", str(run_folder), "--input", str(images), "--output", str(pictures),
                 "--json", str(found), "--threshold", "0", "--device", "cpu", "--keep-ratio", "0.5"]
    assert demo.main(arguments) == 0
    assert "in 2 images" in capsys.readouterr().out
    assert sorted(p.name for p in pictures.iterdir()) == ["a.png", "b.jpg"]
    assert Image.open(pictures / "a.png").size == (60, 40)

    coco = json.loads(found.read_text())
    assert coco["images"][0] == {"id": 1, "file_name": "a.png", "height": 40, "width": 60}
    assert coco["categories"] == [
        {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]
    predict = sparse_detr.Predictor(str(run_folder), device="cpu", keep_ratio=0.5)
    expected = predict(np.asarray(Image.open(images / "a.png"))[:, :, ::-1])["instances"]
    first = [x for x in coco["annotations"] if x["image_id"] == 1]
    assert [x["score"] for x in first] == pytest.approx(expected.scores.tolist())
    assert [x["category_id"] for x in first] == (expected.pred_classes + 1).tolist()
    x0, y0, x1, y1 = expected.pred_boxes.tensor[0].tolist()
    assert first[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-4)


def test_the_json_alone_writes_no_picture(run_folder, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--run", str(run_folder), "--input", str(images / "*.png"), "--json", "found.json",
                 "--confidence-threshold", "0.999", "--device", "cpu"]
    assert demo.main(arguments) == 0
    coco = json.loads(Path("found.json").read_text())
    assert [x["file_name"] for x in coco["images"]] == ["a.png"] and coco["annotations"] == []
    assert not Path("output").exists()


def test_inputs_are_found_once_and_missing_ones_are_named(images, tmp_path):
    everything = demo.find_images([str(images / "b.jpg"), str(images)])
    assert [p.name for p in everything] == ["b.jpg", "a.png"]
    with pytest.raises(ValueError, match="--input nowhere: no such file"):
        demo.find_images(["nowhere"])
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="same name"):
        demo.find_images([str(images), str(tmp_path / "a.png")])


def test_a_video_becomes_a_video(run_folder, tmp_path, capsys):
    cv2 = pytest.importorskip("cv2")
    path, found = tmp_path / "film.avi", tmp_path / "found.json"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for index in range(3):
        writer.write(np.full((48, 64, 3), 80 * index, np.uint8))
    writer.release()
    arguments = ["--run", str(run_folder), "--video-input", str(path), "--output", str(tmp_path),
                 "--json", str(found), "--device", "cpu"]
    assert demo.main(arguments) == 0
    drawn = cv2.VideoCapture(str(tmp_path / "film.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and drawn.get(cv2.CAP_PROP_FRAME_WIDTH) == 64
    names = [x["file_name"] for x in json.loads(found.read_text())["images"]]
    assert names == [f"film.avi/{i:06d}" for i in range(3)]
    assert demo.main([*arguments[:2], "--video-input", str(tmp_path / "none.mp4")]) == 1
    assert "not a video that OpenCV can read" in capsys.readouterr().err


def test_an_error_is_one_sentence(images, tmp_path, capsys):
    assert demo.main(["--run", str(tmp_path), "--input", str(images)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_inputs_are_never_overwritten_and_broken_ones_are_skipped(run_folder, images, tmp_path, capsys):
    command = ["--run", str(run_folder), "--input", str(images), "--device", "cpu"]
    assert demo.main([*command, "--output", str(images)]) == 1
    assert "would overwrite the input" in capsys.readouterr().err
    (images / "broken.jpg").write_bytes(b"no image")
    assert demo.main([*command, "--json", str(tmp_path / "found.json")]) == 0
    assert "skipped" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "found.json").read_text())["images"]) > 0


def test_the_quick_demo_can_be_repeated(tmp_path, monkeypatch, capsys):
    """A folder takes one run: its own is emptied, one that was asked for is not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_quick, "draw", lambda folder: [])
    seen = []

    def main(args):
        folder = Path(args.opts[0].partition("=")[2])
        seen.append((folder.name, (folder / "model_final.pth").exists()))
        return {"bbox": {"AP": 1.0, "AP50": 2.0, "AP-disc": 3.0}}

    monkeypatch.setattr(demo_quick.train_net, "main", main)
    for options in ([], ["--output-dir", "mine"]):
        folder = tmp_path / (options[-1] if options else "output/demo")
        folder.mkdir(parents=True)
        (folder / "model_final.pth").touch()
        monkeypatch.setattr(sys, "argv", ["demo_quick.py", *options])
        demo_quick.main()
    assert seen == [("demo", False), ("mine", True)]
