"""Counting multiply-adds and parameters: against closed forms and against the papers."""

import json
import sys

import pytest
from detectron2.config import instantiate

from sparse_detr.analysis import analyze
from sparse_detr.cli import analyze as tool
from sparse_detr.config import get_config
from sparse_detr.errors import UserError
from sparse_detr.kernels import functional

from .modeling.tiny import tiny_model

SPARSE = "sparse_detr/sparse_detr_r50_30_50ep"
SIZE = (64, 96)
NUM_TOKENS = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
C, M, L, P, F = 32, 4, 4, 2, 48  # of the tiny models


def layer_macs(refreshed, tokens):
    """A deformable encoder layer: a cost per refreshed token, and the values of all tokens."""
    samples = M * L * P
    attention = C * 2 * samples + C * samples + C * C + 4 * C * L * P
    return refreshed * (attention + 2 * C * F + 2 * 5 * C) + tokens * C * C


@pytest.mark.parametrize(
    ("config", "refreshed"),
    [
        (SPARSE, int(0.3 * NUM_TOKENS) + 1),
        ("deformable_detr/deformable_detr_r50_efficient_50ep", NUM_TOKENS),
    ],
)
def test_an_encoder_layer_costs_what_the_formula_says(config, refreshed):
    found = analyze(tiny_model(config), SIZE)
    for layer in (0, 1):
        name = f"transformer.encoder.layers.{layer}"
        assert found[name].macs == layer_macs(refreshed, NUM_TOKENS)


@pytest.mark.parametrize(
    "config",
    ["focus_detr/focus_detr_r50_4scale_12ep", "salience_detr/salience_detr_r50_4scale_12ep"],
)
def test_encoders_whose_token_numbers_come_from_tensors_can_be_counted(config):
    found = analyze(tiny_model(config), SIZE)
    assert found["transformer.encoder.layers.0"].macs > found["transformer.encoder.layers.1"].macs > 0


def test_the_scoring_network_costs_what_the_formula_says():
    found = analyze(tiny_model(SPARSE), SIZE)
    per_token = 5 * C + C * C + C * C // 2 + C // 2 * C // 4 + C // 4
    assert found["transformer.encoder.scorer"].macs == NUM_TOKENS * per_token
    assert found["transformer.encoder.heads"].macs == 0  # only used in training
    assert found["transformer.encoder.heads"].trainable > 0


@pytest.mark.parametrize("compiled_or_fallback", [True, False])
def test_the_count_does_not_depend_on_the_implementation_of_the_op(compiled_or_fallback, monkeypatch):
    found = analyze(tiny_model(SPARSE), SIZE)
    monkeypatch.setattr(functional.build, "is_unavailable", lambda _: not compiled_or_fallback)
    again = analyze(tiny_model(SPARSE), SIZE)
    assert found.modules == again.modules and found.operators == again.operators


def test_modules_are_a_partition_of_the_whole():
    model = tiny_model(SPARSE)
    found = analyze(model, SIZE)
    for parent, module in model.named_modules():
        children = [f"{parent}.{name}".lstrip(".") for name, _ in module.named_children()]
        if parent in ("", "transformer", "transformer.encoder"):
            assert sum(found[name].macs for name in children) == pytest.approx(
                found[parent].macs, rel=0.01
            )  # resized masks and the like belong to the parent
    assert sum(found.operators.values()) == found.total.macs
    assert found.total.parameters == sum(p.numel() for p in model.parameters())


def test_the_model_is_left_as_it_was():
    model = tiny_model(SPARSE).train()
    model.backbone.eval()
    analyze(model, SIZE)
    assert model.training and not model.backbone.training


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match="size=0x96 must be positive"):
        analyze(tiny_model(), (0, 96))


def test_the_tool_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    arguments = [
        "--config-file",
        "quick/deformable_detr_shapes",
        "--size",
        "64x96",
        "--json",
        str(tmp_path / "costs.json"),
        "model.num_classes=7",
    ]
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", *arguments])
    tool.main()
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "costs.json").read_text())
    assert found["config"] == "quick/deformable_detr_shapes" and found["size"] == [64, 96]
    assert f"{found['total']['macs'] / 1e9:.3f}" in printed and "transformer.encoder" in printed
    assert {m["name"] for m in found["modules"]} >= {"", "backbone", "transformer.decoder"}


def test_the_tool_asks_for_the_classes_of_own_data(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", "--config-file", "custom/sparse_detr_r50"])
    with pytest.raises(UserError, match="model.num_classes is not known"):
        tool.main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "gmacs"),
    [
        ("sparse_detr_r50_10_50ep", 105.35),
        ("sparse_detr_swint_50_50ep", 143.66),
    ],
)
def test_the_papers_numbers(config, gmacs):
    """Of the published code at 800x1066. It boxes all tokens, not only the queries', and runs the decoder's
    heads more often (docs/flops.md)."""
    model = instantiate(get_config(f"sparse_detr/{config}", ["model.num_classes=91"]).model)
    found = analyze(model, (800, 1066)).total.macs
    tokens, queries, dim = 17821, 300, 256
    box_head = 2 * dim**2 + 4 * dim
    found += (tokens - queries) * box_head + 5 * queries * dim * 91 + 6 * queries * box_head
    assert found / 1e9 == pytest.approx(gmacs, abs=0.01)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("sparse_detr/sparse_detr_r50_10_50ep", (800, 1066)),
        ("quick/sparse_detr_r50_custom", (240, 320)),
        ("quick/sparse_detr_shapes", (144, 192)),
    ],
)
def test_the_size_is_the_evaluations(name, size):
    assert tool.test_size(get_config(name)) == size
