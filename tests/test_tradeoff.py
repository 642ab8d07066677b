"""tools/tradeoff.py on runs that take moments."""

import json
import sys

import numpy as np
import pytest
from detectron2.config import LazyConfig

import sparse_detr
from benchmarks import budgets
from sparse_detr.cli import tradeoff
from sparse_detr.engine import Checkpointer
from sparse_detr.errors import UserError

from .modeling.tiny import shrink


def save_run(folder, config):
    cfg = sparse_detr.get_config("quick/sparse_detr_shapes")
    small = shrink(sparse_detr.get_config(config).model, num_classes=5)
    cfg.model = small
    cfg.data.root = str(folder / "data")
    cfg.dataloader.test.dataset.num_images = 3
    cfg.dataloader.test.mapper.augmentations.short_edge = 64
    cfg.dataloader.test.num_workers = 0
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    checkpointer = Checkpointer(sparse_detr.build_model(cfg, device="cpu"), str(folder))
    checkpointer.save("model_final")
    checkpointer.tag_last_checkpoint("model_final.pth")
    return str(folder)


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory):
    """A run with a keep ratio, and one without."""
    return [
        save_run(tmp_path_factory.mktemp(name), config)
        for name, config in (
            ("sparse", "sparse_detr/sparse_detr_r50_30_50ep"),
            ("dense", "deformable_detr/deformable_detr_r50_50ep"),
        )
    ]


def test_points_of_two_runs_as_table_json_and_picture(run_folders, tmp_path, capsys):
    found, picture = tmp_path / "new" / "found.json", tmp_path / "new" / "found.png"
    arguments = ["--run", *run_folders, "--keep-ratio", "0.2", "1", "--adaptive", "--device", "cpu"]
    tradeoff.main([*arguments, "--json", str(found), "--output", str(picture)])
    sparse, full, adaptive, dense = json.loads(found.read_text())
    assert [r["keep_ratio"] for r in (sparse, full, adaptive, dense)] == [0.2, 1.0, 0.2, None]
    assert [r["adaptive"] for r in (sparse, full, adaptive, dense)] == [False, False, True, False]
    assert sparse["macs"] == adaptive["macs"] < full["macs"]
    assert sparse["kept"] == pytest.approx(0.2, abs=0.02) and full["kept"] == 1 and dense["kept"] is None
    assert adaptive["kept"] == pytest.approx(0.2, abs=0.02)
    assert adaptive["rule"].startswith("MeanRatio(0.2, ") and sparse["rule"] is None
    for result in (sparse, full, adaptive, dense):
        low, high = result["milliseconds"]["quartiles"]
        assert 0 < low <= result["milliseconds"]["median"] <= high
        assert result["images"] == 3 and 0 <= result["AP"] <= result["AP50"] <= 100
    printed = capsys.readouterr().out
    assert "0.2 per image" in printed and f"{dense['macs'] / 1e9:.2f}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_budgets_are_those_of_the_training(run_folders, tmp_path):
    found = tmp_path / "found.json"
    elastic = ["--opts", "model.transformer.encoder.elastic=[0.15,0.5]"]
    tradeoff.main(
        ["--run", run_folders[0], "--images", "1", "--device", "cpu", "--json", str(found), *elastic]
    )
    assert [r["keep_ratio"] for r in json.loads(found.read_text())] == [0.15, 0.2, 0.3, 0.5]


def test_the_first_images_alone_can_be_measured(run_folders, capsys):
    tradeoff.main(["--run", run_folders[0], "--keep-ratio", "0.5", "--images", "1", "--device", "cpu"])
    assert ": 1 images; GMACs at " in capsys.readouterr().out


def test_what_cannot_be_measured_is_named(run_folders):
    with pytest.raises(UserError, match=r"--keep-ratio 2.0 must lie in \(0, 1\]"):
        tradeoff.main(["--run", run_folders[0], "--keep-ratio", "2"])


@pytest.mark.parametrize("mean", [0.1, 0.6])
def test_what_budgets_per_image_could_win_keeps_the_mean(mean):
    ratios = budgets.in_proportion(np.array([1.0, 2.0, 3.0, 50.0, 0.001]), mean)
    assert ratios.mean() == pytest.approx(mean) and ratios.max() <= min(2 * mean, 1)
    assert ratios.min() == pytest.approx(mean / 2) and ratios[0] < ratios[1] < ratios[2] < ratios[3]


def test_what_budgets_per_image_could_win_is_measured(run_folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["budgets.py", "--run", run_folders[0], "--mean", "0.2"])
    budgets.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("the same", "objects", "their area", "the fewer, the more"))
