"""Packed layers compute what the layers they were compute, whatever happens to the model afterwards."""

import copy
import io

import pytest
import torch
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn

from sparse_detr.export import TensorDetector
from sparse_detr.modeling import build_resnet_d, pack_weights
from sparse_detr.modeling.backbone import fold_frozen_norms
from sparse_detr.modeling.layers import FFN
from sparse_detr.modeling.packing import ROWS, PackedLinear, unpack_weights

from .tiny import reveal, sample, tiny_model

CONFIGS = (
    "deformable_detr/deformable_detr_r50_two_stage_50ep",
    "dino/dino_official_r50_4scale_12ep",  # its heads are one module in several places
    "sparse_detr/sparse_detr_r50_30_50ep",
    "salience_detr/salience_detr_r50_4scale_12ep",
    "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep",
    "rt_detr/hybrid_dino_r50_4scale_12ep",  # GELU, batch norms
)
packs = pytest.mark.skipif(
    not isinstance((lambda m: (pack_weights(m), m[0])[1])(nn.Sequential(nn.Linear(1, 1))), PackedLinear),
    reason="oneDNN's operators are not at hand",
)
IMAGES = [sample(80, 96, 2), sample(64, 64, 1)]


def packed_copy(model):
    packed = copy.deepcopy(model)
    pack_weights(packed)
    return packed


@torch.no_grad()
def outputs(model, images=IMAGES):
    found = model.detect(model.preprocess(images))
    return found.memory, found.logits, found.boxes


def assert_same(model, packed, images=IMAGES):
    for expected, found in zip(outputs(model, images), outputs(packed, images), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_function_and_the_names_of_the_parameters_stay(config):
    model = reveal(tiny_model(config)).eval()
    packed = packed_copy(model)
    assert_same(model, packed)
    state = packed.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    again = copy.deepcopy(packed)
    unpack_weights(again)
    assert not any("Packed" in type(module).__name__ for module in again.modules())
    for expected, found in zip(outputs(model), outputs(again), strict=True):
        assert torch.equal(expected, found)
    # in float64 nothing is packed, and every digit stays
    for expected, found in zip(outputs(model.double()), outputs(packed.double()), strict=True):
        assert torch.equal(expected, found)


def resnet(block, **options):
    channels = (8, 12, 16, 20)
    stages = [
        ResNet.make_stage(
            block,
            2,
            stride_per_block=[1 if i == 0 else 2, 1],
            in_channels=channels[max(i - 1, 0)],
            out_channels=channel,
            norm="FrozenBN",
            **options,
        )
        for i, channel in enumerate(channels)
    ]
    stem = BasicStem(in_channels=3, out_channels=8, norm="FrozenBN")
    return ResNet(stem, stages, out_features=["stem", "res2", "res3", "res4", "res5"])


@pytest.mark.parametrize("build", ["basic", "bottleneck", "resnet-d", "batch norms"])
def test_all_maps_of_a_backbone(build):
    torch.manual_seed(0)
    if build == "resnet-d":
        backbone = build_resnet_d(depth=18, out_features=["res2", "res3", "res4", "res5"])
    elif build == "bottleneck":
        backbone = resnet(BottleneckBlock, bottleneck_channels=4)
    else:
        backbone = resnet(BasicBlock)
    if build == "batch norms":
        backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
        for part in backbone.modules():
            if hasattr(part, "norm"):
                part.norm = nn.BatchNorm2d(part.out_channels)
    for name, buffer in backbone.named_buffers():
        if name.endswith(("running_mean", "norm.bias")):
            nn.init.normal_(buffer)
    fold_frozen_norms(backbone)
    backbone.eval()
    packed = packed_copy(backbone)
    image = torch.rand(2, 3, 70, 50).contiguous(memory_format=torch.channels_last)
    given = image.clone()
    with torch.no_grad():
        expected, found = backbone(image), packed(image)
    assert torch.equal(image, given)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=2e-5, msg=name)

    for trained in (backbone, packed):
        trained.train()
        sum(out.square().mean() for out in trained(image).values()).backward()
    for (name, parameter), same in zip(backbone.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(same.grad, parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


@packs
def test_weights_that_change_are_packed_again():
    model = tiny_model(CONFIGS[0]).eval()
    packed = packed_copy(model)
    outputs(packed)
    other = tiny_model(CONFIGS[0], seed=1).eval()
    packed.load_state_dict(other.state_dict())
    assert_same(other, packed)

    for trained in (other, packed):  # the same step, also through packed layers
        trained.train()
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
        torch.manual_seed(0)
        sum(trained(IMAGES).values()).backward()
        optimizer.step()
        trained.eval()
    assert_same(other, packed)


@packs
def test_copies_and_pickles():
    packed = packed_copy(tiny_model(CONFIGS[0]).eval())
    outputs(packed)
    assert_same(packed, copy.deepcopy(packed))
    file = io.BytesIO()
    torch.save(packed.transformer.encoder, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert isinstance(again.layers[0].ffn.linear1, PackedLinear)
    assert not any("_packed" in vars(m) for m in again.modules())


@packs
def test_tracing_meets_torch_operators_only():
    packed = TensorDetector(packed_copy(tiny_model(CONFIGS[0])))
    image = torch.rand(1, 3, 64, 96) * 255
    with torch.no_grad():
        expected = packed(image)
        program = torch.export.export(packed, (image,), strict=False)
    assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)
    for a, b in zip(program.module()(image), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@packs
def test_bfloat16_is_as_near_to_float32_as_autocast():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 on this processor")
    model = tiny_model(CONFIGS[0]).eval()
    packed = packed_copy(model)
    exact = outputs(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        usual, found = outputs(model)[0], outputs(packed)[0]
    assert found.dtype == usual.dtype
    assert (found - exact).abs().mean() < 1.2 * (usual - exact).abs().mean() + 1e-4


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_feed_forward_block_of_more_tokens_than_a_turn(activation):
    torch.manual_seed(0)
    ffn = FFN(embed_dim=8, ffn_dim=16, activation=activation).eval()
    packed = packed_copy(ffn)
    x = torch.randn(2, ROWS * torch.get_num_threads() + 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), ffn(x))
        assert packed(x[:, :0]).shape == (2, 0, 8)
