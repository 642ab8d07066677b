"""RT-DETR: attention within the coarsest map, the pyramid, ResNet-D, published names of all of it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from torch.testing import assert_close

from sparse_detr.config import get_config
from sparse_detr.engine import Checkpointer
from sparse_detr.engine.convert import convert_state_dict
from sparse_detr.modeling import HybridEncoder, IntraScaleLayer, SinePosition, build_resnet_d
from sparse_detr.modeling.fusion import FusionLayer

from .tiny import feature_maps, masks, reveal, sample, shrink, tiny_model, total_losses

CASES = Path(__file__).resolve().parents[1] / "parity" / "cases"
RT_DETR = "rt_detr/rt_detr_r50_72ep"
R101 = "rt_detr/rt_detr_r101_72ep"  # its encoder is wider than its decoder
R101_SHAPES = {
    "neck.convs.2.weight": (384, 2048, 1, 1),
    "transformer.encoder.layers.0.attention.in_proj_weight": (3 * 384, 384),
    "transformer.encoder.layers.0.ffn.linear1.weight": (2048, 384),
    "transformer.encoder.fusion.pan_blocks.1.conv1.0.weight": (384, 768, 1, 1),
    "transformer.encoder.fusion.output_convs.0.0.weight": (256, 384, 1, 1),
    "transformer.proposal_head.projection.weight": (256, 256),
    "transformer.decoder.layers.5.ffn.linear1.weight": (1024, 256),
}


class Nothing(torch.nn.Module):
    """In the place of the pyramid."""

    def forward(self, memory, tokens):
        return memory


def attention_alone(mask_padding=False):
    layer = IntraScaleLayer(embed_dim=32, num_heads=4, ffn_dim=48)
    encoder = HybridEncoder(layer=layer, num_layers=2, fusion=Nothing(), mask_padding=mask_padding)
    return encoder.double().eval()


def tokens_of(valid=((1.0, 1.0),), change=None):
    transformer = tiny_model("dino/dino_r50_4scale_12ep").double().transformer
    maps = feature_maps(len(valid))
    if change is not None:
        change(maps)
    return transformer.tokenize(maps, masks(*valid))


# ---------------------------------------------------------------------------------------- attention


@torch.no_grad()
def test_only_the_coarsest_map_is_refreshed_and_all_of_it_sees_all_of_it():
    torch.manual_seed(0)
    encoder, tokens = attention_alone(), tokens_of()
    memory = encoder(tokens).memory
    start = tokens.level_starts[-1]
    assert torch.equal(memory[:, :start], tokens.features[:, :start])

    def change(maps):
        maps[-1][0, :, 1, 1] += 1.0

    moved = encoder(tokens_of(change=change)).memory - memory
    assert not moved[:, :start].any() and moved[0, start:].any(-1).all()


@pytest.mark.parametrize("mask_padding", [True, False])
@torch.no_grad()
def test_padding_is_attended_to_only_as_published(mask_padding):
    torch.manual_seed(0)
    encoder, valid = attention_alone(mask_padding), ((1.0, 1.0), (0.5, 1.0))

    def change(maps):
        maps[-1][1, :, 1:] += 1.0  # the lower row of the second image's coarsest map: padding

    before, after = (encoder(tokens_of(valid, c)) for c in (None, change))
    own = ~tokens_of(valid).mask
    assert torch.equal(before.memory[own], after.memory[own]) == mask_padding


def test_a_position_is_its_row_and_column_in_cells():
    position = SinePosition(embed_dim=16, offset=-1.0, normalize=False, interleaved=False)
    mask = torch.zeros(1, 3, 5, dtype=torch.bool)
    code = position(mask, torch.tensor([[5.0, 3.0]], dtype=torch.float64)).unflatten(1, (3, 5))
    frequency = [10000 ** -(k / 4) for k in range(4)]
    for row, column in ((0, 0), (2, 1), (1, 4)):
        wanted = [f(place * w) for place in (row, column) for f in (math.sin, math.cos) for w in frequency]
        assert_close(code[0, row, column], torch.tensor(wanted, dtype=torch.float64))


# ------------------------------------------------------------------------------ pyramid and backbone


@torch.no_grad()
def test_a_narrow_layer_folded_is_the_layer():
    """In evaluation its convolutions have the running statistics in them, and its branches are one."""
    torch.manual_seed(0)
    layer = FusionLayer(8, 4, 1, "BN", context=False).double()
    for norm in (m for m in layer.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0), norm.weight.normal_()
    x = torch.randn(2, 16, 6, 5).double()
    silu = torch.nn.functional.silu
    layer.eval()

    def apply(part, value):  # convolution, then norm
        return part[1](part[0](value))

    through = silu(apply(layer.conv1, x))
    for block in layer.bottlenecks:
        through = silu(apply(block.conv1, through) + apply(block.conv2, through))
    wanted = silu(apply(layer.conv3, through + silu(apply(layer.conv2, x))))
    assert wanted.shape == (2, 8, 6, 5)
    assert_close(layer(x, None), wanted)


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_d_has_one_cell_for_every_started_stride(depth):
    with torch.device("meta"):
        backbone = build_resnet_d(depth=depth, freeze_at=1)
        maps = backbone(torch.zeros(1, 3, 97, 130))
    shapes = backbone.output_shape()
    assert [s.stride for s in shapes.values()] == [8, 16, 32]
    for name, shape in shapes.items():
        assert maps[name].shape[1:] == (shape.channels, -(-97 // shape.stride), -(-130 // shape.stride))
    assert not any(p.requires_grad for p in backbone.stem.parameters())
    assert all(stage[0].shortcut is not None for stage in backbone.stages)


# -------------------------------------------------------------------------------------- whole models


def test_rt_detr_learns_a_batch():
    model = reveal(tiny_model(RT_DETR)).train()
    assert not [n for n, _ in model.named_parameters() if "level_embed" in n]
    batch = [sample(64, 64, seed=1), sample(64, 64, num_boxes=3, seed=2)]
    totals = total_losses(model, batch, steps=16, lr=5e-3)
    assert totals[-1] < 0.9 * totals[0]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        assert all(len(found["instances"]) for found in model(batch))


# ------------------------------------------------------------------------------------ published names

# This project's names -> those of lyuwenyu/RT-DETR, in this order.
_AUTHORS = (
    (r"^neck\.convs\.(\d)\.", r"encoder.input_proj.\1.0."),
    (r"^neck\.norms\.(\d)\.", r"encoder.input_proj.\1.1."),
    (r"^transformer\.encoder\.layers\.", "encoder.encoder.0.layers."),
    (r"^(encoder\.encoder\.0\.layers\.\d)\.attention\.", r"\1.self_attn."),
    (r"^(encoder\.encoder\.0\.layers\.\d)\.norm\.", r"\1.norm1."),
    (r"^(encoder\.encoder\.0\.layers\.\d)\.ffn\.norm\.", r"\1.norm2."),
    (r"^transformer\.encoder\.fusion\.output_convs\.(\d)\.0\.", r"decoder.input_proj.\1.conv."),
    (r"^transformer\.encoder\.fusion\.output_convs\.(\d)\.1\.", r"decoder.input_proj.\1.norm."),
    (r"^transformer\.encoder\.fusion\.lateral_convs\.(\d)\.", r"encoder.lateral_convs.~\1."),
    (r"^transformer\.encoder\.fusion\.layer_blocks\.(\d)\.", r"encoder.fpn_blocks.~\1."),
    (r"^transformer\.encoder\.fusion\.downsample_blocks\.", "encoder.downsample_convs."),
    (r"^transformer\.encoder\.fusion\.pan_blocks\.", "encoder.pan_blocks."),
    (r"^(encoder\.(?:\w+_convs|\w+_blocks)\..*)\.0\.(\w+)$", r"\1.conv.\2"),
    (r"^(encoder\.(?:\w+_convs|\w+_blocks)\..*)\.1\.(\w+)$", r"\1.norm.\2"),
    (r"\.~0\.", ".%1."),  # the path from the top is counted from the top
    (r"\.~1\.", ".%0."),
    (r"\.%", "."),
    (r"^transformer\.proposal_head\.projection\.", "decoder.enc_output.0."),
    (r"^transformer\.proposal_head\.norm\.", "decoder.enc_output.1."),
    (r"^transformer\.proposal_head\.class_head\.", "decoder.enc_score_head."),
    (r"^transformer\.proposal_head\.box_head\.", "decoder.enc_bbox_head."),
    (r"^transformer\.heads\.class_heads\.", "decoder.dec_score_head."),
    (r"^transformer\.heads\.box_heads\.", "decoder.dec_bbox_head."),
    (r"^transformer\.denoising\.label_embed\.", "decoder.denoising_class_embed."),
    (r"^transformer\.decoder\.position_mlp\.", "decoder.query_pos_head."),
    (r"^transformer\.decoder\.layers\.", "decoder.decoder.layers."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.self_norm\.", ".norm1."),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"\.cross_norm\.", ".norm2."),
    (r"^(decoder\..*)\.ffn\.norm\.", r"\1.norm3."),
    (r"\.ffn\.", "."),
)
_AUTHORS_BACKBONE = (
    (r"^stem\.conv(\d)\.", r"conv1.conv1_\1."),
    *((rf"^res{n + 2}\.", f"res_layers.{n}.blocks.") for n in range(4)),
    *((rf"\.conv{n}\.(?!conv1_)", f".branch2{x}.") for n, x in enumerate("abc", start=1)),
    (r"\.shortcut\.1\.", ".short.conv."),
    (r"\.shortcut\.", ".short."),
    (r"\.weight$", ".conv.weight"),
    (r"\.norm\.conv\.", ".norm."),
)


def named(rules, key):
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def with_resnet_d(seed, name=RT_DETR):
    """Small but for its backbone, which is R18-D; the pyramid is narrow and has its last convolutions."""
    torch.manual_seed(seed)
    config = shrink(get_config(name).model)
    if name == R101:
        config.neck.embed_dim = config.transformer.position.embed_dim = 48
        config.transformer.encoder.layer.embed_dim = config.transformer.encoder.fusion.embed_dim = 48
    config.backbone = get_config("models/backbones.py").resnet18_d.backbone
    config.neck.in_channels = [128, 256, 512]
    config.transformer.encoder.fusion.expansion = 0.5
    model = instantiate(config)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 0.2)
    return model


@pytest.mark.parametrize("name", [RT_DETR, R101])
def test_weights_as_the_authors_publish_them(name, tmp_path):
    model, again = with_resnet_d(0, name), with_resnet_d(1, name)
    published = {}
    for key, value in model.state_dict().items():
        if key.startswith("backbone."):
            key = f"backbone.{named(_AUTHORS_BACKBONE, key.removeprefix('backbone.'))}"
        published[named(_AUTHORS, key)] = value
    # spelled out here, so that not only the two tables agree
    assert {
        "backbone.conv1.conv1_2.norm.running_mean",
        "backbone.res_layers.0.blocks.0.short.conv.weight",
        "backbone.res_layers.3.blocks.0.short.conv.norm.bias",
        "backbone.res_layers.3.blocks.1.branch2b.conv.weight",
        "encoder.input_proj.2.1.running_var",
        "encoder.encoder.0.layers.0.self_attn.in_proj_weight",
        "encoder.encoder.0.layers.0.linear2.bias",
        "encoder.lateral_convs.1.conv.weight",
        "encoder.fpn_blocks.0.bottlenecks.2.conv1.norm.weight",
        "encoder.pan_blocks.1.conv3.conv.weight",
        "decoder.input_proj.0.norm.weight",
        "decoder.decoder.layers.1.norm3.bias",
        "decoder.decoder.layers.0.cross_attn.sampling_offsets.weight",
        "decoder.dec_bbox_head.1.layers.2.weight",
        "decoder.query_pos_head.layers.0.weight",
    } <= published.keys()
    torch.save({"ema": {"module": published}}, tmp_path / "rtdetr.pth")
    Checkpointer(again).load(str(tmp_path / "rtdetr.pth"), checkpointables=[])
    found = again.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_encoder_and_backbone_are_loaded_on_another_base():
    """Names and shapes of transformers' R18; the rest of the base has other parts."""
    shapes = json.loads((CASES / "rt_detr/rt_detr_r18_eval.json").read_text())["state_dict"]
    config = get_config("models/dino.py").model
    backbone = get_config("models/backbones.py").resnet18_d
    config.backbone, config.neck.in_channels = backbone.backbone, backbone.in_channels
    config.transformer.num_levels = 3
    config.transformer.decoder.layer.ffn_dim = 1024
    config.transformer.encoder = get_config("encoders/rt_detr.py").encoder
    config.transformer.encoder.fusion.expansion = 0.5
    with torch.device("meta"):
        model = instantiate(config)
        weights, report = convert_state_dict({k: torch.zeros(shape) for k, shape in shapes.items()}, model)
    parts = ("backbone.", "transformer.encoder.")
    assert not [key for key in report.missing if key.startswith(parts)]
    assert all(weights[k].shape == v.shape for k, v in model.state_dict().items() if k.startswith(parts))
    assert not [key for key in report.unexpected if key.startswith(parts)]
    assert {key for key in report.ignored if "input_proj" in key}  # the projection behind the pyramid


def test_the_authors_backbone_starts_a_training(tmp_path):
    model, again = with_resnet_d(0), with_resnet_d(1)
    weights = model.backbone.state_dict()
    torch.save({named(_AUTHORS_BACKBONE, key): value for key, value in weights.items()}, tmp_path / "r18.pth")
    Checkpointer(again, fine_tune=True).load(str(tmp_path / "r18.pth"), checkpointables=[])
    found = again.backbone.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in weights.items())


def test_r101_has_the_published_widths():
    """Those of transformers' ``rtdetr_r101vd`` (encoder_hidden_dim=384, encoder_ffn_dim=2048, d_model=256)."""
    with torch.device("meta"):
        model = instantiate(get_config(R101).model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: shapes[name] for name in R101_SHAPES} == R101_SHAPES
    assert "backbone.res4.22.conv3.weight" in shapes and "backbone.res4.23.conv3.weight" not in shapes


def test_r101_learns_a_batch():
    model = reveal(with_resnet_d(0, R101)).train()
    losses = model([sample(64, 64, seed=1), sample(64, 64, num_boxes=3, seed=2)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("wide", [False, True])
def test_transformers_computes_the_same(wide, tmp_path):
    """Its model, saved by itself and loaded here, on images that are no squares."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    widths = [64, 128, 256, 512]
    backbone = transformers.RTDetrResNetConfig(
        hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic", out_indices=[2, 3, 4]
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=widths[1:],
        encoder_hidden_dim=48 if wide else 32,
        d_model=32,
        decoder_in_channels=[48 if wide else 32] * 3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_layers=2,
        decoder_layers=2,
        decoder_n_points=2,
        num_queries=8,
        num_labels=3,
        hidden_expansion=0.5,
    )
    theirs = transformers.RTDetrForObjectDetection(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)

    model = with_resnet_d(1, R101 if wide else RT_DETR)
    Checkpointer(model).load(str(tmp_path), checkpointables=[])
    images = torch.rand(2, 3, 96, 160)
    with torch.no_grad():
        wanted = theirs.double()(images.double())
        batch = [{"image": image * 255} for image in images.double()]
        found = model.double().eval().detect(model.preprocess(batch))
    assert_close(found.logits, wanted.logits, rtol=0, atol=1e-11)
    assert_close(found.boxes, wanted.pred_boxes, rtol=0, atol=1e-12)
