"""detectron2's own scripts, which call nothing of ours: ``DETECTRON2_ENV_MODULE``."""

import os
import subprocess
import sys

from .test_layering import ROOT

# What its tools/train_net.py does up to the first step, and a model of its own beside it.
SCRIPT = """
import sys
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
import torch

cfg = get_cfg()
assert cfg.INPUT.FORMAT == "BGR" and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS  # other models' stay as they are
cfg.merge_from_file(sys.argv[1])
assert cfg.INPUT.FORMAT == "RGB" and not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
cfg.MODEL.SPARSE_DETR.OVERRIDES += [
    "model.transformer.encoder.num_layers=1", "model.transformer.decoder.num_layers=1"]
cfg.MODEL.DEVICE = "cpu"
from detectron2.modeling import build_model
model = build_model(cfg)
print(type(model).__name__, type(DefaultTrainer.build_optimizer(cfg, model)).__name__)
plain = get_cfg()
print(type(DefaultTrainer.build_optimizer(plain, torch.nn.Linear(2, 2))).__mro__[-3].__name__)
"""


def test_the_variable_alone_brings_the_detectors(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            SCRIPT,
            str(ROOT / "configs" / "yacs" / "sparse_detr_r50.yaml"),
        ],
        env={
            **os.environ,
            "DETECTRON2_ENV_MODULE": "sparse_detr.detectron2_env",
            "PYTHONPATH": str(ROOT / "projects"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SparseDETR", "AdamW", "SGD"]
