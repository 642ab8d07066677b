"""Replays of RT-DETR as transformers computes it: whole models."""

from __future__ import annotations

from detectron2.config import instantiate

from sparse_detr.config import get_config

from . import dino
from .case import Case

NORM = "layer_blocks.1.conv1.1"  # whose statistics a training case stores


def run(case: Case) -> None:
    """Replay a whole-model case and compare everything it stores."""
    dino.run_model(case, build_model(case.config), _compare)


def build_model(config: dict):
    """The model that the configuration of a case describes."""
    model = get_config("models/rt_detr.py").model
    depth = int(config["backbone"].split("-")[1])
    model.backbone.depth = depth
    model.neck.in_channels = [512, 1024, 2048] if depth >= 50 else [128, 256, 512]
    model.num_classes = config["num_classes"]
    transformer = model.transformer
    transformer.encoder.fusion.expansion = config["expansion"]
    transformer.query_selection.num_queries = config["num_queries"]
    transformer.decoder.update(
        num_layers=config["dec_layers"], look_forward_twice=config["look_forward_twice"]
    )
    transformer.denoising.update(
        num_queries=config["dn_number"],
        label_noise_ratio=config["label_noise_ratio"],
        box_noise_scale=config["box_noise_scale"],
    )
    return instantiate(model)


def _compare(case: Case, model, output) -> None:
    if model.training:
        norm = model.transformer.encoder.fusion.get_submodule(NORM)
        case.compare("bn_running_mean", norm.running_mean)
        case.compare("bn_running_var", norm.running_var)
