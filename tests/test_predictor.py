"""Predictor and the package's public names."""

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig

import sparse_detr

from .modeling.tiny import shrink


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The output of a (very short) run: config.yaml and a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    cfg = sparse_detr.get_config("deformable_detr/deformable_detr_r50_efficient_50ep")
    shrink(cfg.model)
    cfg.dataloader.test.mapper.augmentations.short_edge = 96
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    model = sparse_detr.build_model(cfg, device="cpu")
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    return folder


def test_predictor_runs_from_an_output_folder(run_folder):
    predict = sparse_detr.Predictor(str(run_folder), device="cpu")
    image = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    instances = predict(image)["instances"]
    assert instances.image_size == (60, 90) and len(instances) > 0
    boxes = instances.pred_boxes.tensor
    assert (boxes >= 0).all() and boxes[:, 2].max() <= 90 and boxes[:, 3].max() <= 60


def test_a_batch_gives_what_single_images_give(run_folder):
    predict = sparse_detr.Predictor(str(run_folder), device="cpu")
    images = [np.random.default_rng(i).integers(0, 255, (64, 80, 3), dtype=np.uint8)
              for i in range(2)]
    for alone, together in zip(map(predict, images), predict(images)):
        torch.testing.assert_close(alone["instances"].scores, together["instances"].scores)


def test_threshold_drops_low_scores(run_folder):
    image = np.zeros((64, 80, 3), dtype=np.uint8)
    scores = sparse_detr.Predictor(str(run_folder), device="cpu")(image)["instances"].scores
    threshold = float(scores.median())
    predict = sparse_detr.Predictor(str(run_folder), device="cpu", threshold=threshold)
    kept = predict(image)["instances"].scores
    torch.testing.assert_close(kept, scores[scores >= threshold])


def test_wrong_input_is_named(run_folder, tmp_path):
    predict = sparse_detr.Predictor(str(run_folder), device="cpu")
    with pytest.raises(ValueError, match=r"\(H, W, 3\).*\(5, 5\)"):
        predict(np.zeros((5, 5), dtype=np.uint8))
    (tmp_path / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    with pytest.raises(ValueError, match="holds no checkpoint"):
        sparse_detr.Predictor(str(tmp_path))


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        sparse_detr.Nope  # noqa: B018
