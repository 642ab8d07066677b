"""tools/check_data.py and tools/visualize_data.py, as a user runs them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image

from sparse_detr.data import generate_shapes, register_coco
from sparse_detr.errors import UserError
from sparse_detr.visualize import draw_input

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        generate_shapes(str(root), split, num_images=4)
    return root


def call(monkeypatch, tool, *arguments):
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    importlib.import_module(f"sparse_detr.cli.{tool}").main()


def test_check_data_tells_sound_from_broken(data, tmp_path, monkeypatch, capsys):
    train, val = ((data / f"{split}.json", data / split) for split in ("train", "val"))
    call(monkeypatch, "check_data", *train, *val)
    assert "no problem found" in capsys.readouterr().out
    coco = json.loads((data / "train.json").read_text())
    coco["images"][0]["file_name"] = "gone.png"
    (tmp_path / "broken.json").write_text(json.dumps(coco))
    with pytest.raises(UserError, match=r"missing image files: 1 \(gone.png\)"):
        call(monkeypatch, "check_data", tmp_path / "broken.json", data / "train")
    with pytest.raises(SystemExit):
        call(monkeypatch, "check_data", *train, data / "val.json")
    assert "a validation set is two arguments" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["annotation", "dataloader"])
def test_visualize_data_writes_pictures(source, data, tmp_path, monkeypatch, capsys):
    call(
        monkeypatch,
        "visualize_data",
        "--config-file",
        ROOT / "tests" / "engine" / "tiny_own.py",
        "--source",
        source,
        "--output",
        tmp_path,
        "--num",
        3,
        "--width",
        200,
        f"data.train_json={data}/train.json",
        f"data.train_images={data}/train",
    )
    written = capsys.readouterr().out.split()
    assert len(written) == 3 == len(list(tmp_path.iterdir()))
    assert all(Image.open(path).width == pytest.approx(200, abs=1) for path in written)


@pytest.mark.parametrize("source", ["annotation", "dataloader"])
def test_visualize_data_takes_several_sets(source, data, tmp_path, monkeypatch, capsys):
    """A list of names, in a config of one's own."""
    for split in ("train", "val"):
        register_coco(f"test_tools_{split}", f"{data}/{split}.json", f"{data}/{split}")
    (tmp_path / "two.py").write_text(
        "from detectron2.config import LazyCall as L\n"
        "from sparse_detr.config import load_config\n"
        "from sparse_detr.data import registered_dataset\n"
        f"cfg = load_config({str(ROOT / 'tests' / 'engine' / 'tiny_own.py')!r})\n"
        "names = ['test_tools_train', 'test_tools_val']\n"
        "cfg.dataloader.train.dataset = L(registered_dataset)(names=names)\n"
    )
    call(
        monkeypatch,
        "visualize_data",
        "--config-file",
        tmp_path / "two.py",
        "--source",
        source,
        "--output",
        tmp_path / "pictures",
        "--num",
        6,
    )
    assert len(capsys.readouterr().out.split()) == 6


def test_a_tool_tells_a_mistake_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "visualize_data.py"), "--config-file", "custom/dino_r50"]
    command += ["data.train_json=/nowhere.json", "data.train_images=/nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: data set 'custom_train': there is no annotation file /nowhere.json" in done.stderr


def test_the_picture_has_the_channels_that_the_network_gets():
    """Red in the file is red in the picture, in whichever order the model takes it."""
    instances = Instances((60, 80))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0).long()
    red = torch.zeros(3, 60, 80, dtype=torch.uint8)
    red[0] = 200
    for image_format, image in (("RGB", red), ("BGR", red.flip(0))):
        entry = {"image": image, "instances": instances}
        picture = draw_input(entry, Metadata(), image_format)
        assert picture.shape == (60, 80, 3) and (picture == np.array([200, 0, 0])).all()


def test_boxes_are_drawn_where_the_network_sees_them():
    instances = Instances((60, 80))
    instances.gt_boxes = Boxes(torch.tensor([[20.0, 20, 60, 50]]))
    instances.gt_classes = torch.tensor([1])
    entry = {"image": torch.full((3, 60, 80), 90, dtype=torch.uint8), "instances": instances}
    picture = draw_input(entry, Metadata(thing_classes=["cat", "dog"]), scale=2.0)
    rows, columns = np.nonzero((picture != 90).any(-1))
    assert picture.shape == (120, 160, 3)
    assert abs(columns.min() - 40) <= 3 and abs(columns.max() - 120) <= 3
    assert abs(rows.min() - 40) <= 3  # the name may stand below the box
    assert (picture[98:103, 100] != 90).any() and (picture[70, 60:100] == 90).all()
