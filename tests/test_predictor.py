"""Predictor and the package's public names."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

import sparse_detr
from sparse_detr.engine import Checkpointer
from sparse_detr.errors import UserError
from sparse_detr.overlays import recorded_output

from .modeling.tiny import shrink


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The output of a (very short) run: config.yaml and a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    cfg = sparse_detr.get_config("deformable_detr/deformable_detr_r50_efficient_50ep")
    shrunk(cfg)
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    model = sparse_detr.build_model(cfg, device="cpu")
    checkpointer = Checkpointer(model, str(folder))
    checkpointer.class_names = ["cat", "dog", "cow"]
    checkpointer.save("model_final")
    checkpointer.tag_last_checkpoint("model_final.pth")
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
    images = [np.random.default_rng(i).integers(0, 255, (64, 80, 3), dtype=np.uint8) for i in range(2)]
    for alone, together in zip(map(predict, images), predict(images)):
        torch.testing.assert_close(alone["instances"].scores, together["instances"].scores)


def test_threshold_drops_low_scores(run_folder):
    image = np.zeros((64, 80, 3), dtype=np.uint8)
    scores = sparse_detr.Predictor(str(run_folder), device="cpu")(image)["instances"].scores
    threshold = float(scores.median())
    predict = sparse_detr.Predictor(str(run_folder), device="cpu", threshold=threshold)
    kept = predict(image)["instances"].scores
    torch.testing.assert_close(kept, scores[scores >= threshold])


def test_answers_as_detectron2_would(run_folder):
    """The same resizing and channel order as ``DefaultPredictor``, the same kind of result."""
    predict = sparse_detr.Predictor(str(run_folder), device="cpu")
    image = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    found = predict(image)["instances"]
    rgb = np.ascontiguousarray(image[:, :, ::-1])
    rgb = ResizeShortestEdge(96, 1333).get_transform(rgb).apply_image(rgb)
    entry = {"image": torch.as_tensor(rgb.transpose(2, 0, 1).copy()), "height": 60, "width": 90}
    with torch.no_grad():
        expected = predict.model([entry])[0]["instances"]
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
    for field in ("scores", "pred_classes"):
        assert (found.get(field) == expected.get(field)).all()
    assert (found.scores.diff() <= 0).all()
    assert predict([]) == []


def test_class_names_come_with_the_checkpoint_or_the_data_set(run_folder):
    predict = sparse_detr.Predictor(str(run_folder), device="cpu")
    assert predict.class_names == predict.metadata.thing_classes == ["cat", "dog", "cow"]
    assert predict.resizing == {"short_edge": 96, "max_size": 1333}
    cfg = predict.cfg
    assert sparse_detr.Predictor(cfg, device="cpu").class_names == ["0", "1", "2"]
    cfg = sparse_detr.get_config("deformable_detr/deformable_detr_r50_50ep")
    coco = sparse_detr.Predictor(shrunk(cfg, num_classes=80), device="cpu")
    assert coco.class_names[:2] == ["person", "bicycle"] and len(coco.metadata.thing_colors) == 80


def shrunk(cfg, **kwargs):
    shrink(cfg.model, **kwargs)
    cfg.dataloader.test.mapper.augmentations.short_edge = 96
    return cfg


@pytest.mark.parametrize(
    "config",
    [
        "sparse_detr/sparse_detr_r50_30_50ep",
        "focus_detr/focus_detr_r50_4scale_12ep",
    ],
)
def test_the_keep_ratio_is_a_run_time_choice(config):
    cfg, image = shrunk(sparse_detr.get_config(config)), np.zeros((64, 80, 3), np.uint8)
    predict = sparse_detr.Predictor(cfg, device="cpu", keep_ratio=0.2)
    assert predict.keep_ratio == 0.2
    kept = []
    for ratio in (0.2, 0.6):
        predict.keep_ratio = ratio
        with recorded_output(predict.model) as outputs:
            predict(image)
        kept.append(outputs[0].encoded.selected.shape[1] / outputs[0].tokens.mask.shape[1])
    assert kept == pytest.approx([0.2, 0.6], abs=0.01)
    with pytest.raises(ValueError, match=r"keep_ratio=1.5 must lie in \(0, 1\]"):
        predict.keep_ratio = 1.5


@pytest.fixture(scope="module")
def sparse_config():
    return shrunk(sparse_detr.get_config("sparse_detr/sparse_detr_r50_30_50ep"))


def test_a_latency_is_met_by_the_keep_ratio(sparse_config, monkeypatch, caplog):
    """With a clock that only the refreshed tokens move."""
    predict = sparse_detr.Predictor(sparse_config, device="cpu", latency_ms=60)
    image, now = np.zeros((64, 80, 3), np.uint8), [0.0]
    detect = predict.detect

    def timed(entries):
        now[0] += len(entries) * (0.02 + 0.1 * predict.keep_ratio)
        return detect(entries)

    monkeypatch.setattr(predict, "detect", timed)
    monkeypatch.setattr(predict, "_clock", lambda: now[0])
    predict.latency_ms = 70  # with the clock as it is now
    assert len(predict(image)["instances"]) > 0 and predict.keep_ratio == pytest.approx(0.5)
    assert len(predict([image, image])) == 2 and predict.keep_ratio == pytest.approx(0.15)
    predict(image)
    assert predict.keep_ratio == pytest.approx(0.5) and predict.latency_ms == 70
    with recorded_output(predict.model) as outputs:
        predict(image)
    assert len(outputs) == 1  # each size is measured once
    predict.keep_ratio = 0.2
    predict(image)
    assert predict.latency_ms is None and predict.keep_ratio == 0.2
    predict.latency_ms = 1
    caplog.clear()
    predict(image)
    assert "latency_ms=1 cannot be met" in caplog.text and "25 to 120 ms on this cpu" in caplog.text


def test_a_latency_stays_within_the_range_of_an_elastic_model(sparse_config):
    elastic = ["model.transformer.encoder.elastic=[0.2,0.6]"]
    predict = sparse_detr.Predictor(sparse_config, overrides=elastic, device="cpu", latency_ms=1e-3)
    image = np.zeros((64, 80, 3), np.uint8)
    predict(image)
    assert predict.keep_ratio == 0.2
    predict.latency_ms = 1e6
    predict(image)
    assert predict.keep_ratio == 0.6


def test_a_latency_that_cannot_be_asked_for_is_named(run_folder, sparse_config):
    with pytest.raises(UserError, match="keep_ratio=0.5 and latency_ms=80: pass one"):
        sparse_detr.Predictor(sparse_config, device="cpu", keep_ratio=0.5, latency_ms=80)
    with pytest.raises(UserError, match="latency_ms=80: the encoder of this model, DenseEncoder, has no"):
        sparse_detr.Predictor(str(run_folder), device="cpu", latency_ms=80)
    with pytest.raises(UserError, match="latency_ms=0 must be positive"):
        sparse_detr.Predictor(sparse_config, device="cpu", latency_ms=0)
    all_tokens = ["model.transformer.encoder.keep_ratio=null"]
    with pytest.raises(UserError, match="latency_ms=80: .*needs a scoring network"):
        sparse_detr.Predictor(sparse_config, overrides=all_tokens, device="cpu", latency_ms=80)


def test_mixed_precision(run_folder):
    image = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    predict = sparse_detr.Predictor(str(run_folder), device="cpu", dtype=torch.bfloat16)
    scores = predict(image)["instances"].scores
    exact = sparse_detr.Predictor(str(run_folder), device="cpu")(image)["instances"].scores
    assert scores.dtype == torch.float32 and not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.01)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 5), np.uint8), r"\(H, W, 3\).*\(5, 5\)"),
        (np.zeros((5, 5, 3), np.float32), "uint8.*float32"),
        (np.zeros((5, 0, 3), np.uint8), r"shape \(5, 0, 3\)"),  # such as a crop outside the image
        (None, "NoneType; cv2.imread returns None"),
        ("image.jpg", "numpy array, got str"),
        (torch.zeros(3, 5, 5), "numpy array, got Tensor"),
    ],
)
def test_wrong_input_is_named(run_folder, image, message):
    with pytest.raises(ValueError, match=message):
        sparse_detr.Predictor(str(run_folder), device="cpu")(image)


def test_a_loaded_config_takes_overrides_and_stays_as_it_is():
    cfg = shrunk(sparse_detr.get_config("custom/sparse_detr_r50"), num_classes=None)
    overrides = ["model.num_classes=2", "model.max_detections=4"]
    predict = sparse_detr.Predictor(cfg, overrides=overrides, device="cpu")
    model = sparse_detr.build_model(cfg, overrides=overrides, device="cpu")
    for one in (predict.model, model):
        assert (one.num_classes, one.max_detections) == (2, 4)
    assert cfg.model.num_classes is None and predict.cfg.model.num_classes == 2
    with pytest.raises(ValueError, match="Did you mean model.max_detections"):
        sparse_detr.build_model(cfg, overrides=["model.max_detection=4"], device="cpu")


def test_a_run_is_its_folder_by_name_or_path(run_folder):
    predict = sparse_detr.Predictor(str(run_folder), device="cpu")
    weights = predict.model.transformer.heads.class_heads[0].weight
    for config, file in (
        (Path(run_folder), ""),
        (run_folder / "config.yaml", run_folder / "model_final.pth"),
    ):
        model = sparse_detr.build_model(config, file, device="cpu")
        assert torch.equal(model.transformer.heads.class_heads[0].weight, weights)
    assert sparse_detr.Predictor(Path(os.path.relpath(run_folder)), device="cpu").class_names[0] == "cat"


def test_random_weights_are_noted(run_folder, caplog):
    sparse_detr.Predictor(str(run_folder), device="cpu")
    assert "random" not in caplog.text
    sparse_detr.Predictor(str(run_folder / "config.yaml"), device="cpu")
    assert "no weights are given: they are random" in caplog.text


def test_what_cannot_be_a_predictor_is_named(run_folder, tmp_path):
    with pytest.raises(ValueError, match="holds no config.yaml"):
        sparse_detr.Predictor(str(tmp_path))
    (tmp_path / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    with pytest.raises(ValueError, match="holds no checkpoint"):
        sparse_detr.Predictor(str(tmp_path))
    with pytest.raises(ValueError, match="DenseEncoder, has no keep ratio"):
        sparse_detr.Predictor(str(run_folder), device="cpu", keep_ratio=0.5)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        sparse_detr.Nope  # noqa: B018


def test_an_absent_gpu_is_explained(run_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda, but torch sees no GPU: pass device=cpu"):
        sparse_detr.Predictor(str(run_folder), device="cuda")


class SahiModel:
    """How SAHI's ``Detectron2DetectionModel`` calls its predictor: an RGB image in, see its
    ``perform_inference``."""

    def __init__(self, model):
        self.model = model

    def perform_inference(self, image):
        if isinstance(image, np.ndarray) and self.model.input_format == "BGR":
            image = image[:, :, ::-1]
        return self.model(image)


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_sahi_hands_over_the_colours_in_the_right_order(run_folder, input_format):
    """Whatever the model's own order is."""
    overrides = [f"model.input_format={input_format}"]
    predict = sparse_detr.Predictor(str(run_folder), device="cpu", overrides=overrides)
    rgb = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    rgb[..., 0] //= 4
    found = SahiModel(predict).perform_inference(rgb)["instances"]
    expected = predict(np.ascontiguousarray(rgb[:, :, ::-1]))["instances"]
    swapped = predict(rgb)["instances"]
    assert torch.equal(found.scores, expected.scores) and not torch.equal(found.scores, swapped.scores)


def test_the_recipe_for_sahi(run_folder, tmp_path, monkeypatch):
    """The code of docs/predict.md; with a stand-in where SAHI is not installed."""
    page = (Path(__file__).parents[1] / "docs" / "predict.md").read_text()
    (code,) = [c for c in re.findall("```python\n(.*?)```", page, re.S) if "sahi" in c]
    try:
        import sahi  # noqa: F401
    except ImportError:
        for name, module in sahi_stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    image = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.jpg")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "my_run").symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("confidence_threshold=0.3", "confidence_threshold=0.0"), names)
    found = names["result"].object_prediction_list
    assert found and {f.category.name for f in found} <= {"cat", "dog", "cow"}
    assert max(f.bbox.to_xyxy()[2] for f in found) > 640  # of the second tile, in pixels of the image


def sahi_stand_in():
    class Detectron2DetectionModel:
        def __init__(self, *, load_at_init, category_mapping, confidence_threshold):
            assert not load_at_init
            self.category_mapping, self.threshold = category_mapping, confidence_threshold

    def get_sliced_prediction(image, model, *, slice_height, slice_width, **overlaps):
        rgb = np.array(Image.open(image))
        found = []
        for left in (0, rgb.shape[1] - slice_width):
            tile = rgb[:slice_height, left : left + slice_width]
            instances = SahiModel(model.model).perform_inference(tile)["instances"]
            for box, score, label in zip(instances.pred_boxes, instances.scores, instances.pred_classes):
                box = [float(x) + shift for x, shift in zip(box, (left, 0, left, 0))]
                category = SimpleNamespace(name=model.category_mapping[str(int(label))])
                found.append(
                    SimpleNamespace(
                        category=category,
                        score=SimpleNamespace(value=float(score)),
                        bbox=SimpleNamespace(to_xyxy=lambda box=box: box),
                    )
                )
        return SimpleNamespace(object_prediction_list=found)

    return {
        "sahi": SimpleNamespace(),
        "sahi.models": SimpleNamespace(),
        "sahi.models.detectron2": SimpleNamespace(Detectron2DetectionModel=Detectron2DetectionModel),
        "sahi.predict": SimpleNamespace(get_sliced_prediction=get_sliced_prediction),
    }
