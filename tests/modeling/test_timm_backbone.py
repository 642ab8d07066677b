"""Backbones of timm: what is read from them, frozen, folded and loaded. Small models of its own tests."""

import copy
import logging
import sys

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from torch import nn
from torchvision.models import resnet50

from sparse_detr.analysis import analyze
from sparse_detr.config import get_config
from sparse_detr.engine import Checkpointer, build_optimizer
from sparse_detr.engine.convert import convert_state_dict
from sparse_detr.engine.fine_tune import backbone_names
from sparse_detr.errors import UserError
from sparse_detr.modeling import TimmBackbone, timm_channels
from sparse_detr.modeling.timm_backbone import STRIDES, _inspected
from tests.parity.replay import recipe

from .tiny import sample, shrink

CONFIG = "sparse_detr/sparse_detr_timm_30_50ep"


def built(name="test_resnet", **options):
    pytest.importorskip("timm")
    return TimmBackbone(name=name, **options)


def detector(name="test_resnet", *overrides, config=CONFIG):
    """A whole model, small but for its backbone."""
    pytest.importorskip("timm")
    cfg = get_config(config, [f"model.backbone.name={name}", *overrides])
    parts = {key: cfg.model[key] for key in ("backbone", "in_features")}
    channels = cfg.model.neck.in_channels
    shrink(cfg.model)
    cfg.model.update(parts)
    cfg.model.neck.in_channels = channels
    return cfg


def in_a_model(backbone):
    model = nn.Module()
    model.backbone = backbone
    return model


def randomise(model):
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0) if name.endswith(("var", "weight")) else buffer.normal_(std=0.1)
    return model


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_one_line_chooses_the_backbone_and_the_rest_follows(name):
    cfg = detector(name)
    model = instantiate(cfg.model)
    channels = [conv.in_channels for conv in model.neck.convs[:3]]
    assert channels == timm_channels(name=name) and model.strides == [8, 16, 32, 64]
    assert model.pixel_mean.flatten().tolist() == pytest.approx([255 * m for m in model_mean(name)])
    maps = model.backbone(torch.randn(2, 3, 67, 130))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [
        (c, -(-67 // s), -(-130 // s)) for c, s in zip(channels, model.strides)
    ]
    assert cfg.train.init_checkpoint == f"timm://{name}"
    losses = model.train()([sample(70, 90), sample(64, 101, seed=1)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.backbone.parameters() if p.requires_grad)


def model_mean(name):
    import timm

    return timm.get_pretrained_cfg(name).mean


def test_a_timm_resnet50_is_detectron2s():
    """Both with one set of torchvision's weights, frozen alike; maps and gradients in float64."""
    theirs = built("resnet50").double()
    ours = instantiate(get_config("models/backbones").resnet50.backbone).double()
    weights = randomise(resnet50().double()).state_dict()
    for backbone in (theirs, ours):
        model = in_a_model(backbone)
        named = backbone_names(weights, model)
        wanted = {name for name in model.state_dict() if "num_batches" not in name}
        assert wanted <= named.keys()
        model.load_state_dict({name: named[name] for name in wanted}, strict=False)
    image = torch.randn(1, 3, 33, 65, dtype=torch.double)
    found, expected = theirs(image), ours(image)
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for features in (found, expected):
        sum(f.tanh().sum() for f in features.values()).backward()
    assert trained(theirs) == trained(ours)
    torch.testing.assert_close(
        theirs.body.layer2[0].conv1.weight.grad, ours.res3[0].conv1.weight.grad, rtol=1e-8, atol=1e-12
    )
    assert theirs.body.layer4[2].conv3.weight.grad.abs().sum() > 0


def trained(backbone):
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


def test_freeze_at_is_detectron2s():
    model, parts = built(freeze_at=0), []
    for freeze_at in range(4):
        part = {n for n, p in built(freeze_at=freeze_at).named_parameters() if not p.requires_grad}
        parts.append(sorted({name.split(".")[1] for name in part}))
    assert parts == [[], ["conv1"], ["conv1", "layer1"], ["conv1", "layer1", "layer2"]]
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with pytest.raises(
        UserError, match="freeze_at=1: test_convnext has no map of stride 2.*one of 0, 2, 3, 4"
    ):
        built("test_convnext", freeze_at=1)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_frozen_norms_are_folded_and_change_nothing(name):
    timm = pytest.importorskip("timm")
    model = randomise(built(name)).double().train()
    plain = timm.create_model(name, features_only=True).double().eval()  # its norms frozen by the mode
    own = {key.removeprefix("body."): value for key, value in model.state_dict().items()}
    assert not plain.load_state_dict(own, strict=False).unexpected_keys
    folded = [module for module in model.modules() if hasattr(module, "norms")]
    assert len(folded) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    image = torch.randn(1, 3, 64, 96, dtype=torch.double)
    for each in (model, copy.deepcopy(model)):
        for a, b in zip(each(image).values(), plain(image)[-3:], strict=True):
            torch.testing.assert_close(a, b)


def test_batch_norms_that_train_need_padded_images():
    pytest.importorskip("timm")
    trained = detector("test_resnet", "model.backbone.norm=BN")
    kinds = [type(m).__name__ for m in instantiate(trained.model).backbone.modules()]
    assert kinds.count("_FrozenNorm") and kinds.count("BatchNorm2d")  # stem and first stage, and the rest
    for norm in ("BN", "SyncBN"):
        cfg = detector("test_resnet", f"model.backbone.norm={norm}", "model.exact_sizes=true")
        with pytest.raises(UserError, match="pad_features=True .* freeze them .norm=FrozenBN"):
            instantiate(cfg.model)


def test_learning_rate_and_decay_are_a_backbones():
    cfg = detector("test_convnext", config="focus_detr/focus_detr_timm_4scale_12ep")
    model = instantiate(cfg.model)
    backbone = {id(p): n for n, p in model.backbone.named_parameters()}
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    seen = 0
    for group in build_optimizer(cfg.optimizer, model).param_groups:
        for parameter in group["params"]:
            if id(parameter) in backbone:
                seen += 1
                assert group["lr"] == pytest.approx(0.1 * cfg.optimizer.lr)
                assert group["weight_decay"] == (0 if id(parameter) in norms else cfg.optimizer.weight_decay)
    assert seen == sum(p.requires_grad for p in model.backbone.parameters())


# Weights


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_file_of_timms_fills_the_backbone(name, ending, tmp_path, caplog, monkeypatch):
    """By its path, and by ``timm://``, which finds it where timm's table says it is."""
    timm = pytest.importorskip("timm")
    for logger in ("fvcore", "detectron2", "sparse_detr"):  # a run in an earlier test may have turned it away
        monkeypatch.setattr(logging.getLogger(logger), "propagate", True)
    whole = timm.create_model(name, num_classes=7)
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save(whole.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(whole.state_dict(), path)
    entry = timm.get_pretrained_cfg(name)
    entry.hf_hub_id, entry.url = None, str(path)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: entry)
    cfg = detector(name)
    for source in (str(path), cfg.train.init_checkpoint):
        model = instantiate(cfg.model)
        with caplog.at_level(logging.INFO):
            Checkpointer(model, fine_tune=True).load(source, checkpointables=[])
        assert "the weights are a backbone's: the rest of the model starts anew" in caplog.text
        stored = backbone_names(whole.state_dict(), model)
        for key, value in model.backbone.state_dict().items():
            assert torch.equal(value, stored[f"backbone.{key}"]), key
        caplog.clear()


def test_weights_that_timm_does_not_have(tmp_path):
    pytest.importorskip("timm")
    model = in_a_model(built())
    with pytest.raises(
        UserError, match="timm has no weights resnet18.a9_in1k .*take one of resnet18.*a1_in1k"
    ):
        Checkpointer(model).load("timm://resnet18.a9_in1k")
    with pytest.raises(UserError, match="timm has no weights nonsense: pass a file"):
        Checkpointer(model).load("timm://nonsense")


# Salience DETR's FocalNet


FOCALNET = "salience_detr/salience_detr_focalnet_large_4scale_12ep"

# What models/backbones/focalnet.py of xiuqhou/Salience-DETR (6262e05d), large_lrf_fl4 with depths 1, 1, 2, 1 and
# 8 channels, computed in float64: each of its three maps at six places that are spread evenly.
PUBLISHED_MAPS = [
    [-1.157415836748, -2.613394339187, 0.423580719512, 1.747481813452, -0.633441038527, -0.498257271754],
    [-2.015388965174, -1.925825656585, -0.252477764730, -0.307710514617, 0.599631030135, -0.521669710677],
    [1.042669598713, -0.483419634635, 1.146304265063, 0.762171628425, -0.333657906845, 0.302169329579],
]


def published_focalnet(depths, dim):
    """Names and shapes of the backbone in a checkpoint of xiuqhou/Salience-DETR."""
    shapes = {"0.patch_embed.proj": (dim, 3, 7, 7), "0.patch_embed.norm": (dim,)}
    for stage, depth in enumerate(depths):
        c = dim * 2**stage
        for block in range(depth):
            name = f"0.layers.{stage}.blocks.{block}"
            shapes |= {f"{name}.norm{i}": (c,) for i in (1, 2)}
            shapes |= {f"{name}.mlp.fc1": (4 * c, c), f"{name}.mlp.fc2": (c, 4 * c)}
            shapes |= {f"{name}.modulation.f": (2 * c + 5, c), f"{name}.modulation.proj": (c, c)}
            shapes[f"{name}.modulation.h"] = (c, c, 1, 1)
        if stage < 3:
            shapes[f"0.layers.{stage}.downsample.proj"] = (2 * c, c, 3, 3)
            shapes[f"0.layers.{stage}.downsample.norm"] = (2 * c,)
        if stage:
            shapes[f"1.norm{stage}"] = (c,)
    result = {}
    for name, shape in shapes.items():
        result |= {f"backbone.{name}.weight": shape, f"backbone.{name}.bias": shape[:1]}
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name, c = f"backbone.0.layers.{stage}.blocks.{block}", dim * 2**stage
            result |= {f"{name}.gamma_{i}": (c,) for i in (1, 2)}
            for level, side in enumerate((3, 5, 7, 9)):
                result[f"{name}.modulation.focal_layers.{level}.0.weight"] = (c, 1, side, side)
    return result


def salience_detr(neck_channels):
    """The model of the config, small but for its backbone."""
    cfg = get_config(FOCALNET)
    backbone, in_features = cfg.model.backbone, cfg.model.in_features
    shrink(cfg.model).update(backbone=backbone, in_features=in_features)
    cfg.model.neck.in_channels = neck_channels
    return instantiate(cfg.model)


def converted(shapes, model, value):
    """The part of the checkpoint that is the backbone, under our names."""
    marker = "transformer.encoder.background_embedding.row_embed.weight"
    result, report = convert_state_dict(
        {n: value(n, s) for n, s in shapes.items()} | {marker: torch.ones(1)}, model
    )
    assert not report.unexpected and not report.ignored
    assert not [name for name in report.missing if name.startswith("backbone.")]
    own = model.backbone.state_dict()
    return {name: result[f"backbone.{name}"] for name in own}


@pytest.fixture
def small_focalnet(monkeypatch):
    """timm's ``focalnet_large_fl4`` with fewer blocks and channels."""
    timm = pytest.importorskip("timm")
    create = timm.models.focalnet._create_focalnet
    sizes = dict(depths=[1, 1, 2, 1], embed_dim=8)
    monkeypatch.setattr(timm.models.focalnet, "_create_focalnet", lambda *a, **kw: create(*a, **kw | sizes))
    _inspected.cache_clear()
    yield
    _inspected.cache_clear()


def test_a_published_focalnet_computes_what_it_did(small_focalnet):
    model = salience_detr([16, 32, 64]).double().eval()
    weights = converted(
        published_focalnet([1, 1, 2, 1], 8), model, lambda *x: torch.from_numpy(recipe.fill(*x)).double()
    )
    model.backbone.load_state_dict(weights)
    image = torch.from_numpy(recipe.normal("image", (1, 3, 64, 96))).double()
    for found, expected in zip(model.backbone(image).values(), PUBLISHED_MAPS, strict=True):
        places = np.linspace(0, found.numel() - 1, 6).round().astype(int)
        torch.testing.assert_close(found.flatten()[places], found.new_tensor(expected), rtol=0, atol=1e-10)
    parameters = dict(model.backbone.named_parameters())
    frozen = ("body.stem.", "body.layers_0.", "body.layers_1.downsample.")
    assert all(p.requires_grad == (not n.startswith(frozen)) for n, p in parameters.items())


def test_the_whole_focalnet_has_the_published_shapes():
    """On the meta device: 206 million numbers."""
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = salience_detr([384, 768, 1536])
    weights = converted(
        published_focalnet([2, 2, 18, 2], 192), model, lambda _, shape: torch.empty(shape, device="meta")
    )
    model.backbone.load_state_dict(weights)
    drops = [m.drop_prob for m in model.backbone.modules() if hasattr(m, "drop_prob")]
    assert len(drops) == 2 * 23 and drops[-1] == pytest.approx(0.5)  # the first block keeps all


# What a model with such a backbone can do


def test_one_exported_program_serves_all_sizes():
    """Of a network that needs whole cells; test_export.py has what is behind the backbone."""
    model = built("test_convnext").eval()
    sides = {2: torch.export.Dim("height", min=33, max=999), 3: torch.export.Dim("width", min=33, max=999)}
    image = torch.rand(1, 3, 96, 160)
    program = torch.export.export(model, (image,), dynamic_shapes=({**sides},)).module()
    with torch.no_grad():
        for x in (image, torch.rand(1, 3, 101, 203)):
            for a, b in zip(program(x).values(), model(x).values(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_multiply_adds_are_counted():
    model = instantiate(detector("test_convnext").model)
    small, large = (analyze(model, size)["backbone"].macs for size in ((33, 64), (64, 64)))
    assert small == large > 0  # an image is filled up to whole cells


# Errors in one line


def test_without_timm_a_config_loads_and_a_model_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it is an error
    cfg = get_config(CONFIG, ["model.backbone.name=resnet34"])
    with pytest.raises(UserError, match="not installed: pip install timm"):
        instantiate(cfg.model)
    with pytest.raises(UserError, match="timm://resnet34 needs a package: pip install timm"):
        Checkpointer(nn.Linear(1, 1)).load(cfg.train.init_checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="resnet81"), r"timm [\d.]+ has no such model. Did you mean .*resnet18"),
        (dict(name="test_vit"), "has maps of strides 16 and none of 8, 32: take a network with stages"),
        (dict(name="vit_tiny_patch16_224"), "takes images of one size only .*: take another"),
        (dict(norm="GN"), "norm=GN: expected FrozenBN, BN or SyncBN"),
        (dict(out_features=["stride8", "stride5"]), "strides 2, 4, 8, 16, 32 and none of 5"),
        (dict(out_features=list(STRIDES[::-1])), "expected the finest first"),
        (dict(freeze=["layer9"]), "freeze: there is no part layer9 with weights, but conv1"),
        (dict(options={"colour": "red"}), "cannot be built by timm .* unexpected keyword argument 'colour'"),
    ],
)
def test_what_cannot_be_built_is_explained(options, message):
    with pytest.raises(UserError, match=message) as caught:
        built(**options)
    assert "\n" not in str(caught.value)


def test_the_input_must_be_what_the_weights_expect(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sparse_detr"), "propagate", True)
    with pytest.raises(UserError, match="input_format=BGR, but the backbone's weights take RGB"):
        instantiate(detector("test_resnet", "model.input_format=BGR").model)
    instantiate(detector("test_resnet", "model.pixel_mean=[0,0,0]").model)
    assert "model.pixel_mean=[0, 0, 0], but timm's weights of this backbone take [" in caplog.text
