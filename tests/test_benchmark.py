"""benchmarks/benchmark.py at sizes that take seconds: it runs, compares equals and says what it measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.structures import ImageList

from benchmarks import models, ops, peers
from benchmarks.report import write_json

from .modeling.tiny import METHODS, tiny_model

ROOT = Path(__file__).resolve().parent.parent


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "benchmark.py", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_json_has_a_line_per_record(tmp_path):
    value = {
        "machine": {"torch": "2"},
        "levels": [[1, 2]],
        "results": [{"s": [0.5, 1e-7]}, {"s": None}],
        "x": [],
    }
    write_json(tmp_path / "found.json", value)
    text = (tmp_path / "found.json").read_text()
    assert json.loads(text) == value
    assert '  {"s": [0.5, 1e-07]},\n  {"s": null}\n ],\n' in text
    for plain in (3, [], {}, [1, 2], [{"a": 1}, {"b": {}}]):
        write_json(tmp_path / "found.json", plain)
        assert json.loads((tmp_path / "found.json").read_text()) == plain


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "benchmarks").rglob("*.json")), ids=lambda p: p.stem)
def test_stored_measurements_have_a_line_per_record(path, tmp_path):
    write_json(tmp_path / "again.json", json.loads(path.read_text()))
    assert path.read_text() == (tmp_path / "again.json").read_text()


def test_help_of_both_commands():
    for command, flag in (("op", "--kinds"), ("model", "--size")):
        done = benchmark(command, "--help")
        assert done.returncode == 0 and flag in done.stdout, done.stderr


def test_operators_and_a_peer(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text(
        "from sparse_detr.kernels import ms_deform_attn\n"
        "def same(value, shapes, starts, locations, weights):\n"
        "    return ms_deform_attn(value, shapes.tolist(), locations, weights)\n"
        "def other(*inputs):\n"
        "    return 1.01 * same(*inputs)\n"
    )
    small = ("op", "--scale", "0.08", "--rounds", "2", "--kinds", "10 %", "decoder 300")
    done = benchmark(*small, "--peer", f"mine={peer}:same", "--json", str(tmp_path / "op.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "op.json").read_text())
    names = {(r["task"], r["name"]) for r in found["results"]}
    assert {
        ("attention", "mine"),
        ("attention", "grid_sample"),
        ("key-aware", "this package"),
        ("fused", "eager preparation"),
        ("attention-map splat", "scatter_add"),
    } <= names
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in found["results"])
    memory = {
        r["name"]: r["peak_bytes"]
        for r in found["results"]
        if (r["task"], r["kind"], r["direction"]) == ("key-aware", "decoder 300", "backward")
    }
    assert 0 < 4 * memory["this package"] < memory["grid_sample"]
    assert "faster by" in done.stdout and "x (" in done.stdout

    done = benchmark(*small, "--peer", f"wrong={peer}:other")
    assert done.returncode != 0 and "output of wrong differs by 1.0e-02" in done.stderr


def test_16_bits_are_measured_beside_float32():
    done = benchmark(
        "op", "--scale", "0.08", "--rounds", "2", "--kinds", "decoder 300", "--dtype", "bfloat16"
    )
    assert done.returncode == 0, done.stderr
    assert "| attention, decoder 300, backward              | this package, float32 |" in done.stdout


def test_models_and_a_peer(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text("import torch\ndef build():\n    return torch.nn.Conv2d(3, 8, 3).eval()\n")
    done = benchmark(
        "model",
        "dense=quick/deformable_detr_shapes",
        "sparse=quick/sparse_detr_shapes model.transformer.encoder.keep_ratio=0.1",
        "--train",
        "--bf16",
        "--batch",
        "2",
        "--size",
        "96x128",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--peer",
        f"mine={peer}:build",
        "--json",
        str(tmp_path / "model.json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "model.json").read_text())["results"]
    rates = {r["name"]: r["multiply_adds_per_second"] for r in found if r["part"] == "large product"}
    assert set(rates) == {"float32", "bfloat16"} and min(rates.values()) > 1e6
    found = [r for r in found if r["part"] != "large product"]
    macs = {r["name"]: r["multiply_adds"] for r in found if r["part"] == "model"}
    assert macs["dense"] == macs["dense, bf16"] > macs["sparse"] > 0 and macs["mine"] is None
    assert "of the limit" in done.stdout and re.search(r"\| model +\| +dense +\|.*\d%", done.stdout)
    assert {(r["part"], r["name"]) for r in found} == {
        ("model", "dense"),
        ("model", "sparse"),
        ("model", "dense, bf16"),
        ("model", "sparse, bf16"),
        ("model", "mine"),
        ("encoder", "dense"),
        ("encoder", "sparse"),
        ("training step", "dense"),
        ("training step", "sparse"),
        ("training step", "dense, bf16"),
        ("training step", "sparse, bf16"),
    }
    memory = {r["name"]: r["peak_bytes"] for r in found if r["part"] == "training step"}
    assert memory["dense"] > 1e6 and memory["sparse"] > 1e6


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_constants_of_the_host_are_copied_once(context):
    """What a CUDA graph needs, told with the meta device, to which copies are made as to a GPU."""
    x = torch.ones(3, device="meta")

    def work(width):
        number = torch.ones(2).to(torch.float64).sum().item()  # stays on the host
        assert number == 2
        return [x * torch.tensor([width] * 3).to(x.device), torch.zeros(2).to(x.device, non_blocking=True)]

    constants = models.HostConstants()
    with context():
        with constants:
            first = work(1.0)[1]
        with constants.again():
            assert work(2.0)[1] is first
        assert [x.shape for _, x in constants.made.values()] == [(3,), (2,)] and not constants.left
        with pytest.raises(RuntimeError, match="operation .* was aten.* now it is"), constants.again():
            for _ in range(20):
                x.add(1)


@pytest.mark.parametrize("config", [c for c in METHODS if "salience" not in c])  # whose NMS waits
def test_a_second_pass_makes_the_same_constants_in_the_same_order(config):
    """So a CUDA graph can be captured in it: told with the meta device."""
    model = tiny_model(config).eval().to("meta")
    images = ImageList(torch.empty(2, 3, 64, 96, device="meta"), [(64, 96)] * 2)
    constants = models.HostConstants()
    with torch.inference_mode():
        with constants:
            model.detect(images)
        with constants.again():
            model.detect(images)
    assert constants.made and not constants.left


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_model_is_the_same(precision):
    plain = models.ours("quick/sparse_detr_shapes", "cpu")
    if precision != "float32":
        plain = models.in_precision(plain, precision)
    images = models.batches((64, 96), 2, "cpu")[0]
    compiled = models.compiled(plain, images, backend="aot_eager")
    with torch.inference_mode():
        expected, found = plain.detect(images), compiled.detect(images)
    torch.testing.assert_close(found.logits, expected.logits)
    assert compiled.model is plain.model and not compiled.trains and compiled.precision == precision


def test_what_a_cpu_has_not_is_refused():
    for flags in (["--tf32"], ["--graph"], ["--device", "cuda"]):
        if flags[0] != "--device" or not torch.cuda.is_available():
            done = benchmark("model", "quick/sparse_detr_shapes", *flags)
            assert done.returncode == 2 and flags[0] in done.stderr


@pytest.mark.parametrize(
    "name, package",
    [
        ("deformable_detr", "transformers"),
        ("rt_detr_r50", "transformers"),
        ("faster_rcnn", "torchvision"),
        ("onnxruntime", "onnxruntime"),
        ("openvino", "openvino"),
    ],
)
def test_peers_detect(name, package):
    pytest.importorskip(package)
    if package in ("onnxruntime", "openvino"):
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    with torch.inference_mode():
        found = getattr(peers, name)().eval()(torch.rand(1, 3, 256, 256))
    assert found


def test_a_peer_that_does_not_work_here_is_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_peer.py").write_text("class Registry[T]: f'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert ops.imported("broken_peer") is None and ops.imported("no_such_peer") is None
    assert "broken_peer is left out: SyntaxError" in capsys.readouterr().err
