"""int8: what is quantized, what it costs in accuracy, and the file and command around it."""

import subprocess
import sys

import pytest
import torch

from sparse_detr import quantize
from sparse_detr.cli import quantize as command
from sparse_detr.errors import UserError
from sparse_detr.export import TensorDetector
from sparse_detr.predictor import Predictor

from .test_export import OTHERS, TRACED, image, model
from .test_tradeoff import save_run


@pytest.fixture(scope="module")
def detectors():
    """A small Sparse DETR and the same in int8."""
    pytest.importorskip("torchao.quantization.pt2e")
    torch.manual_seed(0)
    detector = model("sparse", exact_sizes=True)
    batches = [[{"image": image(size)[0]}] for size in (TRACED, *OTHERS)]
    return detector, quantize.with_int8(detector, quantize.quantize(detector, batches))


@torch.no_grad()
def test_maps_of_any_size_are_close_to_those_in_float(detectors):
    detector, int8 = detectors
    for size in (TRACED, *OTHERS):
        pixels = (image(size) - detector.pixel_mean) / detector.pixel_std
        expected = detector.neck([detector.backbone(pixels)[name] for name in detector.in_features])
        maps = int8.neck([int8.backbone(pixels)[name] for name in int8.in_features])
        for one, other in zip(maps, expected, strict=True):
            assert one.shape == other.shape
            error = (one - other).norm() / other.norm()
            assert 0 < error < 0.1, error  # rounded, and not by much


@torch.no_grad()
def test_what_is_in_int8_and_what_is_not(detectors):
    detector, int8 = detectors
    assert list(quantize._parts(detector)) == ["maps", "layers.0.ffn", "layers.1.ffn"]
    names = [str(node.target) for node in int8.backbone.graph.graph.nodes if node.op == "call_function"]
    products = [name for name in names if "qconv" in name]
    stages = (detector.backbone.stem, detector.backbone.res2, detector.backbone.res3, detector.backbone.res4)
    convolutions = [m for stage in stages for m in stage.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(products) == len(convolutions) + len(detector.neck.convs)  # nobody reads res5 here
    for part in ("decoder", "heads", "proposal_head", "query_selection"):
        before, after = (getattr(d.transformer, part).state_dict() for d in detectors)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    attention = int8.transformer.encoder.layers[0].attention
    assert type(attention.sampling_offsets) is torch.nn.Linear
    assert not isinstance(detector.neck.convs[0], torch.nn.Identity), "the model itself has been changed"


@torch.no_grad()
def test_tensors_in_tensors_out_as_the_exported_file(detectors):
    for size in (TRACED, *OTHERS):
        scores, labels, boxes = TensorDetector(detectors[1])(image(size))
        assert scores.shape == labels.shape == boxes.shape[:2]
        assert labels.dtype == torch.int64 and (scores.diff() <= 0).all()
        assert (boxes >= 0).all() and (boxes <= torch.tensor(size[::-1] * 2)).all()


@pytest.mark.slow
def test_the_command_writes_a_file_that_predicts_nearly_the_same(tmp_path, capsys):
    pytest.importorskip("torchao.quantization.pt2e")
    (tmp_path / "run").mkdir()
    run, path = save_run(tmp_path / "run", "sparse_detr/sparse_detr_r50_30_50ep"), tmp_path / "int8.pth"
    before = Predictor(run, device="cpu")
    command.main(["--run", run, "--output", str(path), "--images", "2", "--evaluate"])
    printed = capsys.readouterr().out
    assert "MB" in printed and "AP" in printed
    # where nothing has been quantized before
    script = f"from sparse_detr import quantize; quantize.load({str(path)!r})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    predict = quantize.load(path, dtype="float32")
    assert predict.class_names == before.class_names and len(predict.class_names) == 5
    pixels = image((64, 80))[0].permute(1, 2, 0).byte().numpy()
    found, expected = (one(pixels)["instances"] for one in (predict, before))
    assert len(found) == len(expected) > 0
    assert 0 < (found.scores - expected.scores).abs().max() < 0.01
    assert (found.pred_boxes.area().sort()[0] - expected.pred_boxes.area().sort()[0]).abs().max() < 64


def test_a_file_of_another_kind_is_an_error_in_one_line(tmp_path):
    torch.save({"model": {}}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="no file of sparse-detr quantize"):
        quantize.load(tmp_path / "model.pth")
    with pytest.raises(UserError, match="there is no file"):
        quantize.load(tmp_path / "nothing.pth")


def test_calibration_needs_an_image():
    pytest.importorskip("torchao.quantization.pt2e")
    with pytest.raises(UserError, match="no image"):
        quantize.quantize(model("sparse"), [])
