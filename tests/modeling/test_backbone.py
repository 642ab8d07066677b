"""Backbones: the published ones, through detectron2's modules."""

import copy
import runpy
import sys

import pytest
import torch
from detectron2.config import instantiate
from torchvision.models import resnet50

from sparse_detr.config import get_config
from sparse_detr.engine.convert import convert_state_dict
from sparse_detr.modeling import Encoder, build_dilated_resnet, build_swin
from sparse_detr.modeling.backbone import FrozenNormConv2d, fold_frozen_norms


class _Wrapped(torch.nn.Module):
    """A backbone as the converter sees it inside a model."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.transformer = torch.nn.Module()
        self.transformer.encoder = Encoder()


@pytest.mark.parametrize("dilated", [False, True])
def test_resnet_is_torchvisions(dilated):
    torch.manual_seed(0)
    theirs = resnet50(replace_stride_with_dilation=[False, False, dilated]).double().eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    if dilated:
        ours = build_dilated_resnet(out_features=("res3", "res4", "res5"))
    else:
        ours = instantiate(get_config("models/backbones").resnet50.backbone)
    ours = _Wrapped(ours).double().eval()
    published = {f"backbone.0.body.{k}": v for k, v in theirs.state_dict().items() if "fc." not in k}
    # A marker of the family: the transformer that the backbone belongs to.
    published["transformer.encoder.layers.0.self_attn.output_proj.bias"] = torch.zeros(1)
    converted, report = convert_state_dict(published, ours)
    assert not report.missing and len(report.unexpected) == 1
    ours.load_state_dict(converted, strict=False)

    x = torch.randn(1, 3, 65, 97, dtype=torch.double)
    out = ours.backbone(x)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    y = theirs.layer2(theirs.layer1(y))
    torch.testing.assert_close(out["res3"], y)
    y = theirs.layer4(theirs.layer3(y))
    torch.testing.assert_close(out["res5"], y)
    assert out["res5"].shape[-1] == (7 if dilated else 4)


def test_stem_and_first_stage_are_frozen():
    backbone = instantiate(get_config("models/backbones").resnet50.backbone)
    trained = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}


def test_swin_takes_images_of_any_size_and_needs_no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it is an error
    monkeypatch.delitem(sys.modules, "sparse_detr.modeling.backbone")
    fresh = runpy.run_module("sparse_detr.modeling.backbone")
    swin = fresh["build_swin"](embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 6))
    shapes = [tuple(m.shape[1:]) for m in swin.train()(torch.randn(1, 3, 50, 75)).values()]
    assert shapes == [(24, 7, 10), (48, 4, 5), (96, 2, 3)]


def test_stochastic_depth_grows_linearly():
    swin = build_swin(drop_path_rate=0.2)
    rates = [block.drop_path.p for layer in swin.layers for block in layer.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, 12))


@pytest.mark.parametrize("training", [False, True])
def test_frozen_norms_in_the_weights_change_nothing(training):
    torch.manual_seed(0)
    plain = instantiate(get_config("models/backbones").resnet50.backbone).double().train(training)
    for name, buffer in plain.named_buffers():
        buffer.uniform_(0.5, 2.0) if name.endswith(("var", "weight")) else buffer.normal_()
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    fold_frozen_norms(folded)  # idempotent
    assert sum(isinstance(m, FrozenNormConv2d) for m in folded.modules()) == 53
    assert list(folded.state_dict()) == list(plain.state_dict())
    image = torch.randn(1, 3, 64, 96, dtype=torch.double)
    expected, found = plain(image), folded(image.contiguous(memory_format=torch.channels_last))
    # 53 convolutions, forwards and backwards, sum up to 512 * 3 * 3 products; relative to the largest.
    rounding = 2 * 53 * 4608 * torch.finfo(torch.double).eps
    for name in expected:
        atol = rounding * float(expected[name].detach().abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)
    for features in (expected, found):
        sum(f.tanh().sum() for f in features.values()).backward()
    gradients = dict(folded.named_parameters())
    assert sum(p.grad is not None for p in plain.parameters()) > 40
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            assert gradients[name].grad is None
        else:
            atol = rounding * float(parameter.grad.abs().max())
            torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=0, atol=atol)
