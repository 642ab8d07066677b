"""A new method is three files: its encoder, the encoder's config, an experiment. Nothing else is touched.

The three are added to a copy of the checkout, and what a user does with a method is done with them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("projects", "kernels", "configs", "tests", "setup.py", "pyproject.toml")

METHOD = {
    "projects/sparse_detr/modeling/encoders/gated.py": '''
"""The dense encoder behind a gate, which a teacher supervises in training."""

from __future__ import annotations

from torch import nn

from ..encoder import DenseEncoder, EncoderOutput

__all__ = ["GatedEncoder"]


class GatedEncoder(DenseEncoder):
    training_only = ("teacher",)
    published_names = {"authors": ((r"^transformer\\.gate_layer\\.", "gate."),)}
    published_unused = (r"^transformer\\.gate_history$",)

    def __init__(self, *, layer: nn.Module, num_layers: int = 6, embed_dim: int = 256):
        super().__init__(layer=layer, num_layers=num_layers)
        self.gate = nn.Linear(embed_dim, 1)
        self.teacher = nn.Linear(embed_dim, 1)

    def published_notes(self) -> list[str]:
        return ["the gate is open"]

    def forward(self, tokens, proposal_head=None) -> EncoderOutput:
        encoded = super().forward(tokens, proposal_head)
        encoded.memory = encoded.memory * self.gate(tokens.features).sigmoid()
        return encoded

    def losses(self, encoded, decoded, tokens, targets) -> dict:
        return {"loss_gate": self.teacher(encoded.memory).square().mean()}
''',
    "configs/encoders/gated.py": """
from detectron2.config import LazyCall as L

from sparse_detr.modeling import GatedEncoder

from ..models.deformable_detr import model as base

encoder = L(GatedEncoder)(
    layer=base.transformer.encoder.layer, num_layers=6, embed_dim="${model.transformer.embed_dim}"
)
""",
    "configs/gated/gated_shapes.py": """
from ..encoders.gated import encoder
from ..quick.deformable_detr_shapes import data, dataloader, lr_multiplier, model, optimizer, train

model.transformer.encoder = encoder
""",
}

USE = """
import sys
from pathlib import Path

import torch
from detectron2.config import instantiate

from sparse_detr import build_model, engine, get_config, list_configs, modeling
from sparse_detr.engine.convert import convert_state_dict
from tests.modeling.tiny import shrink

folder = Path(sys.argv[1])
assert Path(modeling.__file__).is_relative_to(Path.cwd()) and "GatedEncoder" in modeling.__all__
assert "gated/gated_shapes" in list_configs()

# train a step and evaluate
(folder / "run").mkdir()
splits = [f"dataloader.{split}.{key}" for split in ("train", "test") for key in
          ("num_workers=0", "dataset.num_images=2")]
cfg = get_config("gated/gated_shapes", [f"train.output_dir={folder / 'run'}", f"data.root={folder}",
    "train.max_iter=1", "train.device=cpu", "dataloader.train.total_batch_size=2", *splits])
shrink(cfg.model, num_classes=5)
cfg.model.transformer.encoder.num_layers = 1
assert "bbox/AP" in {f"bbox/{name}" for name in engine.train(cfg)["bbox"]}
assert "loss_gate" in (folder / "run" / "metrics.json").read_text()

# load the run's checkpoint, whole and without what only training needs
model = build_model(folder / "run", device="cpu")
weights = model.state_dict()
gate, teacher = "transformer.encoder.gate.weight", "transformer.encoder.teacher.weight"
torch.save({k: v for k, v in weights.items() if "teacher" not in k}, folder / "no_teacher.pth")
again = build_model(cfg, folder / "no_teacher.pth", device="cpu").state_dict()
assert torch.equal(again[gate], weights[gate]) and not torch.equal(again[teacher], weights[teacher])
torch.save({k: v for k, v in weights.items() if k != gate}, folder / "no_gate.pth")
try:
    build_model(cfg, folder / "no_gate.pth", device="cpu")
except ValueError as error:
    assert f"1 of its tensors are missing ({gate}" in str(error), error
else:
    raise AssertionError("the gate was not missed")

# convert a published file
value = "transformer.encoder.layers.0.{}.value_proj.weight"
published = {value.format("self_attn"): weights[value.format("attention")],
             "transformer.gate_layer.weight": weights[gate], "transformer.gate_history": torch.ones(1)}
converted, report = convert_state_dict(published, model)
assert converted.keys() == {gate, value.format("attention")} and not report.unexpected
assert list(report.ignored) == ["transformer.gate_history"] and "the gate is open" in report.notes
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with the method's files in it."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.npz")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, folder / part)
    for name, text in METHOD.items():
        assert not (folder / name).exists()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def python(folder, *arguments):
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "projects"), str(folder)])}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_trains_evaluates_loads_and_converts(checkout, tmp_path):
    python(checkout, "-c", USE, str(tmp_path))


def test_it_follows_the_rules_of_the_layers(checkout):
    rules = ["tests/test_layering.py", "-k", "gated or cycle or run_time or engine or paper"]
    said = python(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", *rules, "-rA")
    for test in ("test_imports_follow_the_rules", "test_imports_within_the_package_are_relative"):
        assert f"PASSED tests/test_layering.py::{test}[modeling.encoders.gated]" in said
