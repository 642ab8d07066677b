"""torch.export, torch.compile and ONNX: one trace of every method serves images of any size."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparse_detr import export
from sparse_detr.config import get_config
from sparse_detr.kernels import build, op
from sparse_detr.modeling import build_swin
from sparse_detr.predictor import Predictor

from .modeling.tiny import shrink

CONFIGS = {
    "sparse": "sparse_detr/sparse_detr_r50_30_50ep",
    "focus": "focus_detr/focus_detr_r50_4scale_12ep",
    "lite": "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep",
    "dino": "dino/dino_r50_4scale_12ep",
    "deformable": "deformable_detr/deformable_detr_r50_50ep",
    "salience": "salience_detr/salience_detr_r50_4scale_12ep",
    "rt_detr": "rt_detr/rt_detr_r50_72ep",
}
TRACED, OTHERS = (96, 160), ((160, 128), (101, 203))


def model(method, exact_sizes=False):
    """On two levels, for speed, and with random heads: as initialised, all scores are much alike."""
    cfg = shrink(get_config(CONFIGS[method]).model)
    cfg.exact_sizes = exact_sizes
    cfg.in_features, cfg.neck.in_channels = ["res4"], [16]
    cfg.transformer.num_levels = 2
    cfg.transformer.decoder.num_layers = 1
    encoder = cfg.transformer.encoder
    if "num_high_levels" in encoder:
        encoder.num_high_levels = 1
    if "strides" in encoder:
        encoder.strides = encoder.strides[1:3]
    for name in ("size_ranges", "level_ratios"):
        if name in encoder:
            encoder[name] = encoder[name][1:3]
    detector = instantiate(cfg).eval()
    for head in detector.transformer.heads.class_heads:
        torch.nn.init.normal_(head.weight, std=0.3)
    return detector


def image(size):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(sum(size))) * 255


@torch.no_grad()
def assert_same(function, detector, sizes):
    for size in sizes:
        expected = export.TensorDetector(detector)(image(size))
        for a, b in zip(function(image(size)), expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_the_tensor_detector_is_the_detector():
    detector = model("sparse")
    scores, labels, boxes = (x[0] for x in export.TensorDetector(detector)(image(TRACED)))
    found = detector([{"image": image(TRACED)[0]}])[0]["instances"]
    torch.testing.assert_close(scores, found.scores)
    assert (labels == found.pred_classes).all()
    torch.testing.assert_close(boxes, found.pred_boxes.tensor)


@pytest.mark.parametrize(("method", "exact_sizes"), [*((m, False) for m in CONFIGS), ("deformable", True)])
def test_one_exported_program_serves_all_sizes(method, exact_sizes):
    detector = model(method, exact_sizes)
    program = export.export_program(detector, TRACED)
    assert_same(program.module(), detector, (TRACED, *OTHERS))
    attention = [n for n in program.graph.nodes if str(n.target).startswith(op.NAMESPACE)]
    assert bool(attention) != build.is_unavailable("cpu"), "deformable attention should stay one op"


def test_one_compiled_graph_serves_all_sizes():
    """Of Focus-DETR, whose numbers of tokens depend on the size in the most ways."""
    detector = model("focus")
    torch._dynamo.reset()
    compiled = torch.compile(export.TensorDetector(detector), backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(compiled, detector, (TRACED, *OTHERS))


def write_onnx(detector, path, **options):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    export.export_onnx(detector, str(path), TRACED, **options)


@pytest.mark.slow
def test_one_onnx_file_serves_all_sizes(tmp_path):
    """With exact sizes, which add a ranking; those of fixed size below are as published."""
    detector, path = model("focus", exact_sizes=True), tmp_path / "model.onnx"
    write_onnx(detector, path, metadata={"classes": ["a", "b", "c"]})
    errors = export.compare_onnx(detector, str(path), (TRACED, *OTHERS))
    assert all(max(pair) < 1e-4 for pair in errors.values()), errors
    import onnx

    written = onnx.load(str(path))
    assert [x.name for x in written.graph.input] == ["image"]
    assert [x.name for x in written.graph.output] == list(export.OUTPUTS)
    stored = {x.key: json.loads(x.value) for x in written.metadata_props}
    assert stored["input_format"] == "RGB" and stored["classes"] == ["a", "b", "c"]


def average_precision(truth, found):
    """COCO's AP in percent of ``found``, per image (scores, labels, xyxy boxes) as numpy arrays."""
    coco, results = COCO(), []
    for index, (scores, labels, boxes) in enumerate(found):
        for score, label, (left, top, right, bottom) in zip(scores, labels, boxes):
            box = [float(x) for x in (left, top, right - left, bottom - top)]
            results.append({"image_id": index, "category_id": int(label), "bbox": box, "score": float(score)})
    coco.dataset = truth
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0]


def test_the_file_run_as_the_page_says_scores_what_the_predictor_does(tmp_path, monkeypatch):
    """docs/export.md's code on images that are resized, with objects at the border."""
    cfg = get_config(CONFIGS["sparse"])
    shrink(cfg.model)
    cfg.dataloader.test.mapper.augmentations.short_edge = TRACED[0]
    predict = Predictor(cfg, device="cpu")
    predict.model = detector = model("sparse")
    for head in detector.transformer.heads.box_heads:
        head.layers[-1].bias.data[2:] = 3.0  # large ones
    write_onnx(detector, tmp_path / "model.onnx", dynamic=False, metadata=predict.resizing)
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    (code,) = [c for c in re.findall("```python\n(.*?)```", page, re.S) if "InferenceSession" in c]
    monkeypatch.chdir(tmp_path)

    truth = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in range(3)]}
    found, expected, at_border = [], [], 0
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (24, 40, 3), np.uint8)
        pixels = pixels.repeat(10, 0).repeat(10, 1)  # 240x400: made smaller
        Image.fromarray(pixels).save("image.png")
        names: dict = {}
        exec(code.replace("image.jpg", "image.png"), names)
        found.append([names[name][0] for name in ("scores", "labels", "boxes")])
        instances = predict(np.ascontiguousarray(pixels[:, :, ::-1]))["instances"]
        boxes = instances.pred_boxes.tensor.numpy()
        expected.append([instances.scores.numpy(), instances.pred_classes.numpy(), boxes])
        truth["images"].append({"id": index, "height": 240, "width": 400})
        for label, (left, top, right, bottom) in zip(instances.pred_classes[::3].tolist(), boxes[::3]):
            box = [float(x) for x in (left, top, right - left, bottom - top)]
            at_border += left == 0 or top == 0 or right == 400 or bottom == 240
            annotation = {"id": len(truth["annotations"]) + 1, "image_id": index, "category_id": label}
            truth["annotations"].append({**annotation, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    right = average_precision(truth, expected)
    assert right > 5 and at_border > 5
    assert average_precision(truth, found) == pytest.approx(right, abs=0.1)


@pytest.mark.parametrize("method", ["sparse", "lite"])
def test_onnx_of_a_fixed_size(method, tmp_path):
    detector, path = model(method), tmp_path / "model.onnx"
    write_onnx(detector, path, dynamic=False)
    assert max(export.compare_onnx(detector, str(path), [TRACED])[TRACED]) < 1e-4


def test_a_difference_is_found_whatever_the_order():
    scores, labels = torch.tensor([0.9, 0.5]), torch.tensor([1, 0])
    boxes = torch.tensor([[0.0, 0, 8, 8], [4, 4, 9, 9]])
    expected = scores, labels, boxes
    assert export._difference([x.flip(0) for x in expected], expected) == (0, 0)
    moved = export._difference((scores - 0.25, labels, boxes + 2), expected)
    assert moved == (0.25, 2)
    assert export._difference((scores, 1 - labels, boxes), expected)[1] > 3
    assert export._difference([x[:1] for x in expected], expected)[1] == float("inf")


def test_a_model_that_needs_a_fixed_size_says_so(monkeypatch):
    def bake(self, image):
        return image + int(image.shape[-1])

    monkeypatch.setattr(export.TensorDetector, "forward", bake)
    with pytest.raises(ValueError, match=r"free height and width .*--fixed --size 96x160"):
        export.export_program(model("dino"), TRACED)
    assert export.export_program(model("dino"), TRACED, dynamic=False)


def test_a_trace_for_all_sizes_needs_levels_of_more_than_a_token():
    with pytest.raises(ValueError, match="size=32x160: .* both above 32"):
        export.export_program(model("sparse"), (32, 160))


def test_swin_needs_a_fixed_size():
    cfg = shrink(get_config("sparse_detr/sparse_detr_swint_30_50ep").model)
    cfg.backbone = L(build_swin)(embed_dim=24, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2])
    cfg.in_features, cfg.neck.in_channels = ["p1", "p2", "p3"], [48, 96, 192]
    detector = instantiate(cfg)
    with pytest.raises(ValueError, match="SparseDETR with a SwinTransformer .*--fixed --size 96x160"):
        export.export_program(detector, TRACED)
    program = export.export_program(detector, TRACED, dynamic=False)
    assert_same(program.module(), detector, [TRACED])
