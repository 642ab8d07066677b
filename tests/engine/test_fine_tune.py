"""Starting from the weights of others: other classes, published files, backbones, file types."""

import json
import logging
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import instantiate

from sparse_detr.config import get_config, list_configs
from sparse_detr.engine import Checkpointer
from sparse_detr.errors import UserError

from ..modeling.tiny import shrink

CUSTOM = [name for name in list_configs() if name.startswith("custom/")]
CASES = Path(__file__).resolve().parents[1] / "parity" / "cases"
PRIOR_BIAS = -math.log(99)


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
    """A run in an earlier test may have turned the log away from pytest's."""
    for name in ("fvcore", "detectron2", "sparse_detr"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


def tiny(name, num_classes, seed=0):
    torch.manual_seed(seed)
    return instantiate(shrink(get_config(name).model, num_classes=num_classes))


def per_class(model):
    """Names of the tensors with a row per class, found by what changes with their number."""
    return {name for name in model.state_dict() if "class_head" in name or "label_embed" in name}


def stored(model, folder, name="weights.pth", **more):
    torch.save({"model": model.state_dict(), **more}, folder / name)
    return str(folder / name)


def start(model, path, **options):
    Checkpointer(model, fine_tune=True, **options).load(path, checkpointables=[])


# Another number of classes


@pytest.mark.parametrize("name", CUSTOM)
def test_class_rows_start_anew_and_all_else_is_kept(name, tmp_path, caplog):
    old, new = tiny(name, 5), tiny(name, 3, seed=1)
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter)
    initial = {k: v.clone() for k, v in new.state_dict().items()}
    with caplog.at_level(logging.INFO):
        start(new, stored(old, tmp_path))
    adapted, given = new.state_dict(), old.state_dict()
    changed = {k for k in adapted if adapted[k].shape != given[k].shape}
    assert changed == per_class(new)
    assert all(torch.equal(adapted[k], given[k]) for k in adapted.keys() - changed)

    foreground = {k for k in changed if "proposal_head" in k and new.transformer.proposal_head.class_agnostic}
    for key in changed:
        first = given[key][:1] if key in foreground else initial[key][:1]
        assert torch.equal(adapted[key], torch.cat([first, initial[key][1:]])), key
        if key.endswith("bias"):
            assert adapted[key][1:].tolist() == pytest.approx([PRIOR_BIAS] * 2)

    (said,) = [r.getMessage() for r in caplog.records if "fine-tuning" in r.getMessage()]
    assert f"fine-tuning from 5 to 3 classes: {len(changed)} tensors start anew" in said
    assert "transformer.heads.class_heads.*.weight" in said
    assert ("encoder.heads.class_heads" in said) == name.startswith("custom/sparse")
    assert ("label_embed" in said) == (new.transformer.denoising is not None)
    assert not [r for r in caplog.records if "Skip loading" in r.getMessage()]


@pytest.mark.parametrize("counts", [(5, 3), (3, 5)])
def test_evaluation_takes_weights_as_they_are(counts, tmp_path):
    old, new = (tiny("custom/sparse_detr_r50", count) for count in counts)
    with pytest.raises(ValueError, match="trained for {} classes, the model has {}:".format(*counts)):
        Checkpointer(new).load(stored(old, tmp_path))


def test_equal_numbers_are_not_touched(tmp_path, caplog):
    old, new = tiny("custom/dino_r50", 3), tiny("custom/dino_r50", 3, seed=1)
    with caplog.at_level(logging.INFO):
        start(new, stored(old, tmp_path))
    assert "fine-tuning" not in caplog.text
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())


# Published checkpoints: their names and shapes are in the parity cases


@pytest.mark.parametrize(
    ("name", "case", "classes", "tensors"),
    [
        ("deformable_detr_r50", "deformable_detr/deformable_r50_two_stage", 91, 14),
        ("sparse_detr_r50", "sparse_detr/sparse_r50_rho0.1", 91, 24),
        ("focus_detr_r50", "focus_detr/focus_full_eval_padded", 80, 15),
        ("salience_detr_r50", "salience_detr/salience_full_train", 91, 15),
        ("lite_dino_r50", "lite_detr/lite_dino_r50_h3l1_2p1x3", 91, 5),
    ],
)
def test_published_checkpoints_start_a_run(name, case, classes, tensors, tmp_path, caplog):
    shapes = json.loads((CASES / f"{case}.json").read_text())["state_dict"]
    weights = {key: torch.tensor(0.25).expand(shape) for key, shape in shapes.items()}
    cfg = get_config(f"custom/{name}", ["model.num_classes=3"])
    queries = next((s[0] for k, s in shapes.items() if "tgt_embed" in k), None)
    if queries is not None:
        cfg.model.transformer.query_selection.num_queries = queries
    model = instantiate(cfg.model)
    torch.save({"model": weights}, tmp_path / "published.pth")
    with caplog.at_level(logging.INFO):
        start(model, str(tmp_path / "published.pth"))
    assert f"fine-tuning from {classes} to 3 classes: {tensors} tensors" in caplog.text
    assert "not found in the checkpoint" not in caplog.text
    new = per_class(model)
    assert all(
        (v == 0.25).all() for k, v in model.state_dict().items() if k not in new and v.is_floating_point()
    )
    with pytest.raises(ValueError, match=f"trained for {classes} classes, the model has 3"):
        Checkpointer(model).load(str(tmp_path / "published.pth"))


# Weights of something else


def test_evaluating_a_backbone_is_an_error_and_training_from_it_is_one_line(tmp_path, caplog):
    model = tiny("custom/dino_r50", 3)
    backbone = {k: v + 1 for k, v in model.backbone.state_dict().items()}
    torch.save(backbone, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="tensors are missing .*A backbone alone can only start"):
        Checkpointer(tiny("custom/dino_r50", 3)).load(str(tmp_path / "backbone.pth"))
    with caplog.at_level(logging.INFO):
        start(model, str(tmp_path / "backbone.pth"))
    assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in backbone.items())
    assert "the weights are a backbone's: the rest of the model starts anew" in caplog.text
    assert "not found in the checkpoint" not in caplog.text


def test_training_only_parts_may_be_missing_in_evaluation(tmp_path):
    old = tiny("custom/dino_r50", 3)
    weights = {k: v for k, v in old.state_dict().items() if "denoising" not in k}
    torch.save(weights, tmp_path / "weights.pth")
    Checkpointer(tiny("custom/dino_r50", 3, seed=1)).load(str(tmp_path / "weights.pth"))


def test_weights_that_fit_nowhere_are_an_error(tmp_path):
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not one of its tensors fits the model"):
        start(tiny("custom/dino_r50", 3), str(tmp_path / "other.pth"))


def test_another_shape_is_an_error_in_evaluation(tmp_path):
    cfg = shrink(get_config("custom/dino_r50").model)
    cfg.transformer.query_selection.num_queries = 9
    path = stored(instantiate(cfg), tmp_path)
    with pytest.raises(ValueError, match=r"content.weight: \(9, 32\) instead of \(8, 32\)"):
        Checkpointer(tiny("custom/dino_r50", 3)).load(path)


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_torchvision_resnets_load_under_their_own_names(stride_in_1x1, tmp_path, caplog):
    cfg = get_config("custom/dino_r50", ["model.num_classes=3"]).model
    cfg.backbone.stages.stride_in_1x1 = stride_in_1x1
    cfg.transformer.encoder.num_layers = cfg.transformer.decoder.num_layers = 1
    model = instantiate(cfg)
    resnet = torchvision.models.resnet50(weights=None)
    for norm in (m for m in resnet.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
    torch.save(resnet.state_dict(), tmp_path / "resnet50.pth")
    with caplog.at_level(logging.INFO):
        start(model, str(tmp_path / "resnet50.pth"))
    assert "the weights are a backbone's" in caplog.text
    assert ("poor features" in caplog.text) == stride_in_1x1
    if not stride_in_1x1:
        image = torch.randn(1, 3, 64, 64)
        for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            image = getattr(resnet.eval(), part)(image) if part != "conv1" else resnet.conv1(first := image)
        torch.testing.assert_close(model.backbone(first)["res5"], image, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("msra_model", [False, True])
@pytest.mark.parametrize("msra_weights", [False, True, None])
def test_the_kind_of_a_resnet_is_told_by_its_first_convolution(
    msra_model, msra_weights, merged, tmp_path, caplog
):
    """In a file without a maker's name; None: as initialised, which does not tell.

    detectron2's files of Caffe2's kind have the norms' statistics merged into scale and bias, Keras' do not.
    """
    cfg = get_config("custom/dino_r50", ["model.num_classes=3"]).model
    cfg.backbone.stages.stride_in_1x1 = msra_model
    cfg.transformer.encoder.num_layers = cfg.transformer.decoder.num_layers = 1
    model = instantiate(cfg)
    backbone = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    stem = {k: v for k, v in backbone.items() if k.startswith("stem.")}
    assert 0.2 < stem["stem.conv1.weight"].flatten(1).norm(dim=1).median() < 0.5  # untrained, all scales 1
    if msra_weights is not None:
        stem["stem.conv1.norm.bias"].normal_()
        deviation = 1.0 if merged else 7.0
        stem["stem.conv1.norm.running_var"].fill_(deviation**2)
        if not merged:
            stem["stem.conv1.norm.running_mean"].normal_()
        stem["stem.conv1.norm.weight"].mul_(deviation * (2.5 / 58 if msra_weights else 2.5))
    torch.save(backbone, tmp_path / "backbone.pth")
    with caplog.at_level(logging.INFO):
        start(model, str(tmp_path / "backbone.pth"))
    mixed_up = msra_weights is not None and msra_weights != msra_model
    assert ("poor features" in caplog.text) == mixed_up
    expects = f"expects weights of {'Caffe2' if msra_model else 'torchvision'}'s kind"
    assert (expects in caplog.text) == (msra_weights is None)


# File types


def test_safetensors_hold_the_same_weights(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    old, new = tiny("custom/dino_r50", 3), tiny("custom/dino_r50", 3, seed=1)
    safetensors.save_file(old.state_dict(), tmp_path / "weights.safetensors")
    Checkpointer(new).load(str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="cannot read the weights .*cut.safetensors"):
        Checkpointer(new).load(str(tmp_path / "cut.safetensors"))


WEB_PAGE = b"<!DOCTYPE html><html><head><title>Virus scan warning</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"


@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w.npz"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (WEB_PAGE, "it is a web page"),
        (POINTER, "it is a Git LFS pointer.*git lfs pull"),
        (b"", "the file is empty"),
        (b"no weights at all", r"\w+"),
        (None, r"\w+"),  # the first half of a file
    ],
)
def test_what_is_no_weights_file_is_told_with_a_remedy(content, reason, name, tmp_path):
    path = tmp_path / name
    if content is None:
        values = {"w": np.zeros(1000, np.float32)}
        with open(path, "wb") as file:
            {
                ".pth": lambda: torch.save({"w": torch.zeros(1000)}, file),
                ".pkl": lambda: pickle.dump({"model": values, "__author__": "x"}, file),
                ".npz": lambda: np.savez(file, **values),
            }[path.suffix]()
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    told = rf"{name} \({len(content):,} bytes\): {reason}.*pass train.init_checkpoint="
    with pytest.raises(UserError, match=told) as caught:
        start(tiny("custom/dino_r50", 3), str(path))
    assert "weights_only=False" not in str(caught.value)


def test_an_address_that_cannot_be_reached_is_told_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    address = "http://127.0.0.1:1/R-50.pkl"
    with pytest.raises(UserError, match=rf"cannot fetch the weights {address} .*/path/to/them"):
        start(tiny("custom/dino_r50", 3), address)


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


class Encoded:
    """Loads any codec's module when it is unpickled."""

    def __reduce__(self):
        import _codecs

        return (_codecs.encode, ("", "idna"))


@pytest.mark.parametrize("content", [Evil(), Encoded()])
@pytest.mark.parametrize("wrap", ["alone", "inside an array"])
def test_a_pickle_cannot_run_code(content, wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = content if wrap == "alone" else np.array([content], dtype=object)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": {"w": value}, "__author__": "x"}))
    with pytest.raises(ValueError, match="evil.pkl was not loaded: it asks for"):
        start(tiny("custom/dino_r50", 3), str(tmp_path / "evil.pkl"))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_honest_pickles_of_any_protocol_load(protocol, tmp_path):
    model = tiny("custom/dino_r50", 3)
    arrays = {k: v.numpy() + 1 for k, v in model.backbone.state_dict().items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    start(model, str(tmp_path / "r.pkl"))
    assert all(np.array_equal(v, model.backbone.state_dict()[k].numpy()) for k, v in arrays.items())
