"""``sparse-detr predict`` and ``demo``: what it reads, draws and writes."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
from detectron2.config import LazyConfig
from PIL import Image

import sparse_detr
from sparse_detr.cli import demo as demo_quick
from sparse_detr.cli import predict as demo
from sparse_detr.engine import Checkpointer
from sparse_detr.errors import UserError

from .modeling.tiny import shrink

ROOT = Path(__file__).resolve().parents[1]


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
    arguments = [
        "--run",
        str(run_folder),
        "--input",
        str(images),
        "--output",
        str(pictures),
        "--json",
        str(found),
        "--threshold",
        "0",
        "--device",
        "cpu",
        "--keep-ratio",
        "0.5",
    ]
    demo.main(arguments)
    assert "in 2 images" in capsys.readouterr().out
    assert sorted(p.name for p in pictures.iterdir()) == ["a.png", "b.jpg"]
    assert Image.open(pictures / "a.png").size == (600, 400)  # enlarged, so that labels hide nothing

    coco = json.loads(found.read_text())
    assert coco["images"][0] == {"id": 1, "file_name": "a.png", "height": 40, "width": 60}
    assert coco["categories"] == [
        {"id": 1, "name": "cat"},
        {"id": 2, "name": "dog"},
        {"id": 3, "name": "cow"},
    ]
    predict = sparse_detr.Predictor(str(run_folder), device="cpu", keep_ratio=0.5)
    expected = predict(np.asarray(Image.open(images / "a.png"))[:, :, ::-1])["instances"]
    first = [x for x in coco["annotations"] if x["image_id"] == 1]
    assert [x["score"] for x in first] == pytest.approx(expected.scores.tolist())
    assert [x["category_id"] for x in first] == (expected.pred_classes + 1).tolist()
    x0, y0, x1, y1 = expected.pred_boxes.tensor[0].tolist()
    assert first[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-4)


def test_a_latency_is_measured_on_this_machine(run_folder, images, caplog, monkeypatch, tmp_path):
    shown = mock.Mock()
    monkeypatch.setattr(demo, "setup_logger", shown)
    monkeypatch.setattr(logging.getLogger("sparse_detr"), "propagate", True)  # whatever ran before
    arguments = ["--run", str(run_folder), "--input", str(images / "a.png"), "--device", "cpu"]
    arguments += ["--json", str(tmp_path / "found.json"), "--latency-ms"]
    demo.main([*arguments, "100000"])
    assert "latency_ms=100000 cannot be met" in caplog.text  # so slow no ratio is
    shown.assert_called_once_with(name="sparse_detr")
    with pytest.raises(UserError, match="keep_ratio=0.5 and latency_ms=9.0: pass one"):
        demo.main([*arguments, "9", "--keep-ratio", "0.5"])


def test_the_json_alone_writes_no_picture(run_folder, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--run",
        str(run_folder),
        "--input",
        str(images / "*.png"),
        "--json",
        "found.json",
        "--confidence-threshold",
        "0.999",
        "--device",
        "cpu",
    ]
    demo.main(arguments)
    coco = json.loads(Path("found.json").read_text())
    assert [x["file_name"] for x in coco["images"]] == ["a.png"] and coco["annotations"] == []
    pixels = np.asarray(Image.open(images / "a.png"))[:, :, ::-1]
    best = sparse_detr.Predictor(str(run_folder), device="cpu")(pixels)["instances"].scores[0]
    assert f"no detection of at least 0.999 in 1 images; the best score is {best:.3f}, in a.png" in (
        capsys.readouterr().out
    )
    assert not Path("output").exists()


def test_inputs_are_found_once_and_missing_ones_are_named(images, tmp_path):
    everything = demo.find_images([str(images / "b.jpg"), str(images)])
    assert [p.name for p in everything] == ["b.jpg", "a.png"]
    with pytest.raises(UserError, match="--input nowhere: no such file"):
        demo.find_images(["nowhere"])
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="same name"):
        demo.find_images([str(images), str(tmp_path / "a.png")])


@pytest.fixture
def film(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (64, 48))
    for index in range(3):
        writer.write(np.full((48, 64, 3), 80 * index, np.uint8))
    writer.release()
    return tmp_path / "film.mp4"


def test_a_video_becomes_a_video(run_folder, film, tmp_path):
    output, found = tmp_path / "drawn", tmp_path / "found.json"
    arguments = [
        "--run",
        str(run_folder),
        "--video-input",
        str(film),
        "--output",
        str(output),
        "--json",
        str(found),
        "--device",
        "cpu",
    ]
    demo.main(arguments)
    drawn = cv2.VideoCapture(str(output / "film.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert drawn.get(cv2.CAP_PROP_FRAME_WIDTH) == 64 * 9  # enlarged, as pictures are
    names = [x["file_name"] for x in json.loads(found.read_text())["images"]]
    assert names == [f"film.mp4/{i:06d}" for i in range(3)]


def test_a_video_is_neither_overwritten_nor_left_out_silently(run_folder, film, tmp_path, monkeypatch):
    command = ["--run", str(run_folder), "--device", "cpu", "--video-input"]
    content = film.read_bytes()
    with pytest.raises(UserError, match=r"would overwrite the input .*film\.mp4"):
        demo.main([*command, str(film), "--output", str(film.parent)])
    assert film.read_bytes() == content
    for name in ("none.mp4", "empty.mp4"):
        (tmp_path / "empty.mp4").touch()
        with pytest.raises(UserError, match=f"{name}: not a video that OpenCV can read"):
            demo.main([*command, str(tmp_path / name), "--output", str(tmp_path / "drawn")])
    (tmp_path / "drawn" / "film.mp4").mkdir()  # stands for a folder or codec that refuses
    with pytest.raises(UserError, match=r"film\.mp4: OpenCV cannot write a video"):
        demo.main([*command, str(film), "--output", str(tmp_path / "drawn")])


def test_what_was_found_before_an_interruption_is_written(run_folder, images, tmp_path, monkeypatch):
    found = tmp_path / "found.json"
    monkeypatch.setattr(demo.Image.Image, "save", mock.Mock(side_effect=[None, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        demo.main(
            [
                "--run",
                str(run_folder),
                "--input",
                str(images),
                "--device",
                "cpu",
                "--output",
                str(tmp_path / "drawn"),
                "--json",
                str(found),
            ]
        )
    assert [x["file_name"] for x in json.loads(found.read_text())["images"]] == ["a.png", "b.jpg"]


def test_an_error_is_one_sentence(images, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tools" / "demo.py"),
        "--run",
        str(tmp_path),
        "--input",
        str(images),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_inputs_are_never_overwritten_and_broken_ones_are_skipped(
    run_folder, images, tmp_path, capsys, monkeypatch
):
    command = ["--run", str(run_folder), "--input", str(images), "--device", "cpu"]
    with pytest.raises(UserError, match="would overwrite the input"):
        demo.main([*command, "--output", str(images)])
    (images / "broken.jpg").write_bytes(b"no image")
    Image.new("L", (200, 100)).save(images / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)  # twice that is refused
    demo.main([*command, "--json", str(tmp_path / "found.json")])
    skipped = capsys.readouterr().err
    assert f"skipped {images / 'broken.jpg'}" in skipped and f"skipped {images / 'huge.png'}" in skipped
    assert len(json.loads((tmp_path / "found.json").read_text())["images"]) == 2


def test_pictures_of_files_that_pil_cannot_write_are_png(run_folder, images, tmp_path):
    (images / "b.jpg").rename(images / "b.jpg.part")
    demo.main(
        [
            "--run",
            str(run_folder),
            "--input",
            str(images / "*"),
            "--device",
            "cpu",
            "--output",
            str(tmp_path / "drawn"),
        ]
    )
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["a.png", "b.jpg.part.png"]


def test_the_quick_demo_can_be_repeated(tmp_path, monkeypatch, capsys):
    """A folder takes one run: its own is emptied, one that was asked for is not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_quick, "draw", lambda folder: [])
    monkeypatch.setattr(demo_quick, "write_page", lambda folders, page: pages.append(page))
    seen, pages = [], []

    def main(args):
        folder = Path(args.opts[0].partition("=")[2])
        seen.append((folder.name, (folder / "model_final.pth").exists()))
        return {"bbox": {"AP": 1.0, "AP50": 2.0, "AP-disc": 3.0}}

    monkeypatch.setattr(demo_quick.train, "run_process", main)
    for options in ([], ["--output-dir", "mine"]):
        folder = tmp_path / (options[-1] if options else "output/demo")
        folder.mkdir(parents=True)
        (folder / "model_final.pth").touch()
        monkeypatch.setattr(sys, "argv", ["demo_quick.py", *options])
        demo_quick.main()
    assert seen == [("demo", False), ("mine", True)]
    assert pages == ["output/demo/report.html", "mine/report.html"]


def test_images_that_training_refuses_are_skipped_and_named(run_folder, images, tmp_path, capsys):
    """Those of more than 8 bits would be white or black."""
    Image.fromarray(np.full((40, 60), 3000, np.uint16)).save(images / "c.png")
    Image.fromarray(np.full((40, 60), 0.5, np.float32)).save(images / "d.tif")
    found = tmp_path / "found.json"
    demo.main(["--run", str(run_folder), "--input", str(images), "--json", str(found), "--device", "cpu"])
    assert [i["file_name"] for i in json.loads(found.read_text())["images"]] == ["a.png", "b.jpg"]
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(told) == 2
    for name, line in zip(("c.png", "d.tif"), told, strict=True):
        assert f"{name}: more than 8 bits per channel" in line and "save it with 8 bits" in line
