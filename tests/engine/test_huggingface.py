"""Weights of Hugging Face's transformers: both implementations run on the same weights."""

import json
import logging
import re
import sys
import types

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate

from sparse_detr.cli import export_transformers
from sparse_detr.config import get_config
from sparse_detr.engine import Checkpointer
from sparse_detr.engine.huggingface import from_transformers, to_transformers
from sparse_detr.engine.huggingface_folder import save_transformers
from sparse_detr.errors import UserError
from sparse_detr.predictor import build_model

VARIANTS = {
    "deformable_detr_r50_50ep": {},
    "deformable_detr_r50_refine_50ep": {"with_box_refine": True},
    "deformable_detr_r50_two_stage_50ep": {"with_box_refine": True, "two_stage": True},
}
# transformers 5 (5.24; 4.57 does not) computes the code of two-stage proposals in float32, whatever the model's type.
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
        use_pretrained_backbone=False,
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
    try:
        other.save_pretrained(tmp_path)
    except RuntimeError:  # version 4 has safetensors write no heads under two names
        other.save_pretrained(tmp_path, safe_serialization=False)
    model = ours(name)
    Checkpointer(model).load(str(tmp_path), checkpointables=[])
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
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(images=images((600, 900))[0].byte(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 800, 1200)
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0.06, 0.19, 0.41], abs=0.02)
    assert_equal_outputs(name, model, other.eval())


# What needs no transformers

# Ends of the names, without ".weight" and ".bias", of what transformers 5.24 writes for a layer of each kind.
_ENDS = {
    r"model\.encoder\.layers\.0\.": "self_attn.sampling_offsets self_attn.attention_weights self_attn.value_proj "
    "self_attn.output_proj self_attn_layer_norm fc1 fc2 final_layer_norm",
    r"model\.decoder\.layers\.0\.": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj "
    "self_attn_layer_norm encoder_attn.sampling_offsets encoder_attn.attention_weights encoder_attn.value_proj "
    "encoder_attn.output_proj encoder_attn_layer_norm fc1 fc2 final_layer_norm",
    r"model\.backbone\.conv_encoder\.model\.layer1\.0\.": "conv1 bn1 conv2 bn2 conv3 bn3 downsample.0 downsample.1",
    r"model\.backbone\.conv_encoder\.model\.(?!layer)": "conv1 bn1",
    r"model\.input_proj\.3\.": "0 1",
    r"model\.(?!backbone|input_proj|encoder|decoder)": "level_embed enc_output enc_output_norm pos_trans pos_trans_norm",
    r"model\.decoder\.(?!layers)": "class_embed.0 class_embed.1 class_embed.2 "
    + " ".join(f"bbox_embed.{head}.layers.{layer}" for head in range(3) for layer in range(3)),
}


def test_names_are_transformers():
    names = to_transformers(ours("deformable_detr_r50_two_stage_50ep"))
    for start, ends in _ENDS.items():
        found = {
            re.sub(rf"{start}|\.(weight|bias|running_\w+)$", "", name)
            for name in names
            if re.match(start, name)
        }
        assert found == {*ends.split()}, start
    assert "model.query_position_embeddings.weight" in to_transformers(ours("deformable_detr_r50_50ep"))


def assert_equal_states(model, other):
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []


@pytest.mark.parametrize("load", [Checkpointer, DetectionCheckpointer])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_is_read_again(name, load, tmp_path):
    model, again = ours(name), ours(name, seed=1)
    torch.save(to_transformers(model), tmp_path / "pytorch_model.bin")
    load(again).load(str(tmp_path / "pytorch_model.bin"), checkpointables=[])
    assert_equal_states(model, again)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_stands_for_its_weights(name, tmp_path):
    pytest.importorskip("safetensors")
    model = ours(name)
    save_transformers(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {str(k): str(k) for k in range(5)}
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
    again = build_model(f"deformable_detr/{name}", tmp_path, overrides=SMALL, device="cpu").double()
    model.float().double()  # as the loaded one has been
    assert_equal_states(model, again)


def test_names_in_the_memory_of_version_5(tmp_path):
    model = ours("deformable_detr_r50_two_stage_50ep")
    files = to_transformers(model)
    memory = {}
    for key, value in files.items():
        key = re.sub(r"\.fc([12])\.", r".mlp.fc\1.", key).replace("self_attn.out_proj", "self_attn.o_proj")
        memory[key.replace("backbone.conv_encoder.", "backbone.")] = value
    assert memory.keys() != files.keys()
    torch.save(memory, tmp_path / "memory.pth")
    again = ours("deformable_detr_r50_two_stage_50ep", seed=1)
    Checkpointer(again).load(str(tmp_path / "memory.pth"), checkpointables=[])
    assert_equal_states(model, again)


def test_a_head_stored_once_is_every_layers(tmp_path):
    model = ours("deformable_detr_r50_two_stage_50ep")
    stored = {k: v for k, v in to_transformers(model).items() if not re.search("class_embed.[1-9]", k)}
    torch.save(stored, tmp_path / "weights.pth")
    Checkpointer(model).load(str(tmp_path / "weights.pth"), checkpointables=[])
    heads = [*model.transformer.heads.class_heads, model.transformer.proposal_head.class_head]
    assert len(heads) == 3
    assert all(torch.equal(head.weight, stored["class_embed.0.weight"]) for head in heads)


def test_damaged_files_are_told():
    model = ours("deformable_detr_r50_refine_50ep")
    weights = to_transformers(model)
    without = {k: v for k, v in weights.items() if "decoder.layers.1.self_attn.k_proj.bias" not in k}
    with pytest.raises(UserError, match="q_proj.bias, but not model.decoder.layers.1.self_attn.k_proj.bias"):
        from_transformers(without, model)
    weights["model.decoder.bbox_embed.1.layers.0.bias"] += 1
    with pytest.raises(UserError, match="two names of one head, but differ"):
        from_transformers(weights, model)


def test_a_training_starts_from_them_with_other_classes(tmp_path, caplog, monkeypatch):
    for logger in ("fvcore", "detectron2", "sparse_detr"):
        monkeypatch.setattr(logging.getLogger(logger), "propagate", True)
    old = ours("deformable_detr_r50_two_stage_50ep")
    torch.save(to_transformers(old), tmp_path / "weights.pth")
    new = instantiate(
        get_config(
            "deformable_detr/deformable_detr_r50_two_stage_50ep", [*SMALL, "model.num_classes=3"]
        ).model
    ).double()
    with caplog.at_level(logging.INFO):
        Checkpointer(new, fine_tune=True).load(str(tmp_path / "weights.pth"), checkpointables=[])
    assert "a published checkpoint of the family transformers" in caplog.text
    assert "fine-tuning from 5 to 3 classes" in caplog.text
    assert torch.equal(new.transformer.level_embed, old.transformer.level_embed)


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ("sparse_detr/sparse_detr_r50_30_50ep", [], "a dense encoder; learned queries, or two stages"),
        ("dino/dino_r50_4scale_12ep", [], "learned queries, or two stages as in its paper"),
        ("deformable_detr/deformable_detr_swint_efficient_50ep", [], "a ResNet of torchvision's kind"),
        (
            "deformable_detr/deformable_detr_r50_50ep",
            ["model.backbone.stages.stride_in_1x1=true"],
            "a ResNet",
        ),
        (
            "deformable_detr/deformable_detr_r50_50ep",
            ["model.transformer.position.offset=0"],
            "position codes",
        ),
        ("deformable_detr/deformable_detr_r50_50ep", ["model.input_format=BGR"], "input in RGB"),
    ],
)
def test_models_that_transformers_has_not_are_not_written(config, overrides, expected, tmp_path):
    pytest.importorskip("safetensors")
    model = instantiate(get_config(config, overrides).model)
    with pytest.raises(UserError, match=f"Deformable DETR has {expected}.*this model is another one"):
        save_transformers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_reference_points_are_told(tmp_path, caplog, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr(logging.getLogger("sparse_detr"), "propagate", True)
    model = instantiate(
        get_config("deformable_detr/deformable_detr_r50_50ep", [*SMALL, "model.exact_sizes=true"]).model
    )
    save_transformers(model, tmp_path)
    assert "model.exact_sizes=true and model.pad_features=true: transformers has neither" in caplog.text


def test_the_tool_writes_a_run(tmp_path, capsys):
    pytest.importorskip("safetensors")
    model = ours("deformable_detr_r50_50ep").float()
    torch.save({"model": model.state_dict(), "class_names": list("abcde")}, tmp_path / "weights.pth")
    command = ["--config-file", "deformable_detr/deformable_detr_r50_50ep", "--output", str(tmp_path / "out")]
    export_transformers.main([*command, "--weights", str(tmp_path / "weights.pth"), *SMALL])
    assert "model.safetensors" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"]["c"] == 2
    again = ours("deformable_detr_r50_50ep", seed=1).float()
    Checkpointer(again).load(str(tmp_path / "out"), checkpointables=[])
    assert_equal_states(model, again)


# Where they lie


def test_folders_without_weights(tmp_path):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="is a folder and holds no model.safetensors or .*: pass a file"):
        Checkpointer(model).load(str(tmp_path))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="pass the run's checkpoint, .*model_final.pth"):
        Checkpointer(model).load(str(tmp_path))


class Missing(FileNotFoundError):
    pass


class Offline(Missing):
    pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub; the files that are there, and what it was asked for."""
    files, asked = {}, []

    def hf_hub_download(repo_id, filename, *, revision=None, force_download=False):
        asked.append((repo_id, filename, revision))
        if repo_id == "no/network":
            raise Offline("cannot be reached")
        if filename not in files:
            raise Missing(f"404: no {filename}")
        return str(files[filename])

    errors = types.ModuleType("huggingface_hub.errors")
    errors.EntryNotFoundError, errors.LocalEntryNotFoundError = Missing, Offline
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download, module.errors = hf_hub_download, errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return files, asked


@pytest.mark.parametrize("load", [Checkpointer, DetectionCheckpointer])
def test_the_hub(hub, tmp_path, load):
    files, asked = hub
    model, again = ours("deformable_detr_r50_50ep"), ours("deformable_detr_r50_50ep", seed=1)
    files["pytorch_model.bin"] = tmp_path / "pytorch_model.bin"
    torch.save(to_transformers(model), files["pytorch_model.bin"])
    load(again).load("hf://owner/name", checkpointables=[])
    assert_equal_states(model, again)
    assert asked == [("owner/name", name, None) for name in ("model.safetensors", "pytorch_model.bin")]
    asked.clear()
    load(again).load("hf://owner/name@v1.0/pytorch_model.bin", checkpointables=[])
    assert asked == [("owner/name", "pytorch_model.bin", "v1.0")]


def test_what_the_hub_has_not(hub, monkeypatch):
    def load(path):
        Checkpointer(torch.nn.Linear(1, 1)).load(path)

    fetch = "fetch the file elsewhere and pass train.init_checkpoint="
    with pytest.raises(UserError, match=rf"pytorch_model.bin of hf://a/b \(404.*\): {fetch}"):
        load("hf://a/b")
    with pytest.raises(UserError, match=rf"hf://no/network \(cannot be reached\): {fetch}"):
        load("hf://no/network")
    assert [name for repo, name, _ in hub[1] if repo == "no/network"] == ["model.safetensors"]
    with pytest.raises(UserError, match="hf://name, expected hf://owner/name"):
        load("hf://name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="hf://a/b needs a package: pip install huggingface_hub"):
        load("hf://a/b")


def test_the_hub_of_today_is_called_as_it_wants_to_be():
    hub = pytest.importorskip("huggingface_hub")
    import inspect

    from huggingface_hub import errors

    parameters = inspect.signature(hub.hf_hub_download).parameters
    assert list(parameters)[:2] == ["repo_id", "filename"] and {"revision", "force_download"} <= {*parameters}
    assert issubclass(errors.LocalEntryNotFoundError, errors.EntryNotFoundError)
