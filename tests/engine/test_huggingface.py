"""Weights of Hugging Face's transformers: both implementations run on the same weights."""

import json
import sys

import pytest
import torch
from detectron2.config import instantiate

from sparse_detr.config import get_config
from sparse_detr.engine import Checkpointer
from sparse_detr.engine.huggingface import to_transformers
from sparse_detr.engine.huggingface_folder import save_transformers
from sparse_detr.errors import UserError
from sparse_detr.predictor import build_model

VARIANTS = {
    "deformable_detr_r50_50ep": {},
    "deformable_detr_r50_refine_50ep": {"with_box_refine": True},
    "deformable_detr_r50_two_stage_50ep": {"with_box_refine": True, "two_stage": True},
}
# Version 5 of transformers computes the code of two-stage proposals in float32, whatever the model's type.
ATOL = {name: 1e-6 if "two_stage" in options else 1e-11 for name, options in VARIANTS.items()}
SMALL = [
    "model.num_classes=5",
    "model.transformer.embed_dim=64",
    "model.transformer.query_selection.num_queries=12",
    *(f"model.transformer.{part}.num_layers=2" for part in ("encoder", "decoder")),
    *(f"model.transformer.{part}.layer.ffn_dim=48" for part in ("encoder", "decoder")),
]


def ours(name, seed=0):
    """A small model of a shipped config, every one of its weights random."""
    torch.manual_seed(seed)
    model = instantiate(get_config(f"deformable_detr/{name}", SMALL).model).double().eval()
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif "norm" in key and key.endswith("weight"):
            value.uniform_(0.5, 1.0)
        elif key.startswith("backbone"):
            value.normal_(std=0.02)
        else:
            value.normal_(std=0.1)
    model.load_state_dict(state)
    return model


def theirs(name, seed=0):
    """The same model of transformers, random weights, no two heads alike."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    torch.manual_seed(seed)
    config = transformers.DeformableDetrConfig(
        num_labels=5,
        d_model=64,
        num_queries=12,
        two_stage_num_proposals=12,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        **VARIANTS[name],
    )
    model = transformers.DeformableDetrForObjectDetection(config).double().eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif not key.startswith("model.backbone"):
                value.add_(torch.randn_like(value) * 0.05)
    return model


@torch.no_grad()
def outputs(model, images):
    """Logits and normalised cxcywh boxes of the last layer, for a padded batch."""
    output = model.detect(model.preprocess([{"image": image} for image in images]))
    return output.logits, output.boxes


@torch.no_grad()
def their_outputs(other, model, images):
    height, width = (max(image.shape[k] for image in images) for k in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width, dtype=torch.float64)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for index, image in enumerate(images):
        h, w = image.shape[1:]
        pixels[index, :, :h, :w] = (image - model.pixel_mean) / model.pixel_std
        mask[index, :h, :w] = 1
    output = other(pixel_values=pixels, pixel_mask=mask)
    return output.logits, output.pred_boxes


def images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, h, w, generator=generator).double() * 255 for h, w in sizes]


BATCHES = {"one image": images((96, 128)), "padded": images((96, 128), (128, 80))}


def assert_equal_outputs(name, model, other):
    for kind, batch in BATCHES.items():
        got, want = outputs(model, batch), their_outputs(other, model, batch)
        for what, a, b in zip(("logits", "boxes"), got, want):
            print(f"{name}, {kind}: {what} differ by {(a - b).abs().max():.1e}, spread {b.std():.2f}")
            assert b.std() > 0.01
            torch.testing.assert_close(a, b, rtol=0, atol=ATOL[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_files_of_transformers_are_read(name, tmp_path):
    other = theirs(name)
    other.save_pretrained(tmp_path)
    model = ours(name)
    Checkpointer(model).load(str(tmp_path / "model.safetensors"), checkpointables=[])
    assert_equal_outputs(name, model, other)


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_what_is_written(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    model = ours(name)
    save_transformers(model, tmp_path, class_names=list("abcde"))
    other, info = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert other.config.id2label == dict(enumerate("abcde"))
    assert_equal_outputs(name, model, other.eval())
