"""Lite DETR's encoder: who is refreshed when, by which layer, and what is left alone."""

import pytest
import torch
from detectron2.config import instantiate
from torch.testing import assert_close

from sparse_detr.config import get_config, list_configs
from sparse_detr.engine.convert import convert_state_dict
from sparse_detr.modeling import (
    DeformableEncoderLayer,
    DenseEncoder,
    KeyAwareDeformAttn,
    LiteEncoder,
    LiteEncoderLayer,
    MSDeformAttn,
)
from sparse_detr.modeling.tokens import Tokens, flatten_levels

from .tiny import sample, shrink, total_losses

LITE = "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep"
PLAIN = "lite_detr/lite_dino_plain_r50_h3l1_2p1x3_36ep"
SHAPES = ((8, 10), (4, 5), (2, 3), (1, 2))
WIDTH = 16


def encoder(
    layer=LiteEncoderLayer, attention=KeyAwareDeformAttn, low_ffn_dim=WIDTH, levels=4, seed=0, **options
):
    """A small one in double precision, its parameters drawn."""
    torch.manual_seed(seed)
    attention = attention(embed_dim=WIDTH, num_heads=4, num_levels=levels, num_points=2)
    own = dict(low_ffn_dim=low_ffn_dim) if layer is LiteEncoderLayer else {}
    layer = layer(attention=attention, embed_dim=WIDTH, ffn_dim=24, dropout=0.0, **own)
    cls = LiteEncoder if isinstance(layer, LiteEncoderLayer) else DenseEncoder
    if cls is LiteEncoder:
        options.setdefault("num_levels", levels)
    built = cls(layer=layer, **options).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


def tokens(shapes=SHAPES, batch=2, seed=0, grow=(0, 0)):
    """Random tokens; ``grow`` adds padding at the bottom and right of every level."""
    generator = torch.Generator().manual_seed(seed)
    content = [torch.randn(batch, 2 * WIDTH, h, w, generator=generator).double() for h, w in shapes]
    padded = tuple((h + grow[0], w + grow[1]) for h, w in shapes)
    masks, maps = [], []
    for part, (h, w), size in zip(content, shapes, padded):
        masks.append(torch.ones(batch, *size, dtype=torch.bool))
        masks[-1][:, :h, :w] = False
        maps.append(torch.randn(batch, 2 * WIDTH, *size).double())
        maps[-1][:, :, :h, :w] = part
    extents = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64).expand(batch, -1, -1)
    features, position = flatten_levels(maps).chunk(2, dim=-1)
    return Tokens(
        features=features,
        position=position,
        mask=flatten_levels(masks),
        shapes=padded,
        extents=extents,
        has_padding=grow != (0, 0),
    )


def steps(built, data):
    """(queries, values attended to, result) of every layer, in the order of the calls."""
    seen = []
    layers = [*built.layers, *(built.low_layers or [])]
    hooks = [
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0], args[3], out)))
        for layer in layers
    ]
    memory = built(data).memory
    for hook in hooks:
        hook.remove()
    return seen, memory


@pytest.mark.parametrize(
    ("num_blocks", "schedule"),
    [(1, "HHHHHG"), (2, "HHGHHG"), (3, "HGHGHG"), (6, "GGGGGG")],
)
def test_a_block_ends_with_all_tokens(num_blocks, schedule):
    built, data = encoder(num_layers=6, num_blocks=num_blocks, num_high_levels=3), tokens()
    seen, memory = steps(built, data)
    total, high = memory.shape[1], 20 + 6 + 2
    assert [x.shape[1] for x, _, _ in seen] == [{"H": high, "G": total}[s] for s in schedule]
    assert [built.is_global(i) for i in range(6)] == [s == "G" for s in schedule]


@pytest.mark.parametrize("levels", [1, 3, 4, 5])
def test_any_split_of_any_number_of_levels(levels):
    shapes = tuple((2 ** (levels - i), 2 ** (levels - i)) for i in range(levels))
    for high in range(1, levels + 1):
        built = encoder(levels=levels, num_layers=2, num_blocks=1, num_high_levels=high)
        seen, memory = steps(built, tokens(shapes))
        assert seen[0][0].shape[1] == sum(h * w for h, w in shapes[levels - high :])
        assert memory.isfinite().all()


def test_a_high_level_step_leaves_low_level_tokens_alone():
    data = tokens()
    seen, memory = steps(encoder(num_layers=4, num_blocks=2, num_high_levels=2), data)
    low = SHAPES[0][0] * SHAPES[0][1] + SHAPES[1][0] * SHAPES[1][1]
    assert torch.equal(seen[1][1][:, :low], data.features[:, :low])  # first global step reads
    assert torch.equal(seen[1][1][:, low:], seen[0][2])
    assert torch.equal(seen[2][1], seen[1][2]) and torch.equal(memory, seen[3][2])
    assert not torch.equal(memory[:, :low], data.features[:, :low])


def test_low_level_tokens_have_a_feed_forward_network_of_their_own():
    built, data = encoder(num_layers=2, num_blocks=1, num_high_levels=3), tokens()
    low = SHAPES[0][0] * SHAPES[0][1]
    before = built(data).memory
    torch.nn.init.normal_(built.layers[1].low_ffn.linear2.bias)
    after = built(data).memory
    assert torch.equal(before[:, low:], after[:, low:])
    assert not torch.isclose(before[:, :low], after[:, :low]).all(-1).any()
    torch.nn.init.normal_(built.layers[1].ffn.linear2.bias)
    assert torch.equal(built(data).memory[:, :low], after[:, :low])


def test_only_layers_that_need_a_small_network_have_one():
    for blocks, wanted in ((1, {5}), (2, {2, 5}), (3, {1, 3, 5})):
        names = encoder(num_layers=6, num_blocks=blocks).state_dict()
        assert {int(n.split(".")[1]) for n in names if "low_ffn" in n} == wanted
    assert not [n for n in encoder(low_ffn_dim=None).state_dict() if "low_ffn" in n]


def test_with_all_levels_high_it_is_the_dense_encoder():
    data = tokens(grow=(1, 3))
    lite = encoder(attention=MSDeformAttn, low_ffn_dim=None, num_layers=2, num_blocks=1, num_high_levels=4)
    dense = encoder(DeformableEncoderLayer, attention=MSDeformAttn, num_layers=2)
    dense.load_state_dict(lite.state_dict())
    assert_close(lite(data).memory, dense(data).memory)


def test_one_network_and_every_layer_global_is_the_dense_encoder():
    data = tokens()
    lite = encoder(low_ffn_dim=None, num_layers=2, num_blocks=2, num_high_levels=2)
    dense = encoder(DeformableEncoderLayer, num_layers=2)
    dense.load_state_dict(lite.state_dict())
    assert_close(lite(data).memory, dense(data).memory)


def test_the_separate_low_level_update_follows_all_high_level_ones():
    """Fig. 2 of the paper: A updates of the high-level tokens, then one of the low-level ones."""
    built = encoder(num_layers=4, num_blocks=2, num_high_levels=2, merge_low_update=False)
    data = tokens()
    seen, memory = steps(built, data)
    low, high = 80 + 20, 6 + 2
    assert [x.shape[1] for x, _, _ in seen] == [high, high, low] * 2
    first, second = seen[2], seen[5]
    assert torch.equal(first[0], data.features[:, :low])
    assert torch.equal(first[1][:, low:], seen[1][2])  # reads what both updates have made
    assert torch.equal(memory, torch.cat([second[2], seen[4][2]], dim=1))
    # its layers have the small network only
    assert [layer.ffn.linear1.out_features for layer in built.low_layers] == [WIDTH] * 2
    assert not [name for name in built.state_dict() if "low_ffn" in name]
    merged = encoder(num_layers=4, num_blocks=2, num_high_levels=2)
    assert len(merged.layers) == 4 and merged.low_layers is None


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("attention", [KeyAwareDeformAttn, MSDeformAttn])
def test_padding_does_not_change_the_memory(attention, merge):
    built = encoder(attention=attention, num_layers=4, num_blocks=2, merge_low_update=merge)
    alone, padded = tokens(), tokens(grow=(2, 3))
    assert_close(built(padded).memory[~padded.mask], built(alone).memory.flatten(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_layers=6, num_blocks=4), "num_layers=6 must be a multiple of num_blocks=4"),
        (dict(num_layers=6, num_blocks=0), "num_layers=6 must be a multiple of num_blocks=0"),
        (dict(num_high_levels=0), r"num_high_levels=0 must lie in 1\.\.4"),
        (dict(num_high_levels=5), r"num_high_levels=5 must lie in 1\.\.4"),
        (dict(num_high_levels=4, merge_low_update=False), "needs low-level tokens to update"),
    ],
)
def test_impossible_splits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encoder(**options)


def published_parameters(config, overrides=()):
    """Parameters of a shipped model with the 91 classes of the published one."""
    with torch.device("meta"):
        model = instantiate(get_config(config, ["model.num_classes=91", *overrides]).model)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("h3l1_2p1x3", 47684222), ("h2l2_2p1x3", 47684222), ("h3l1_6p1x1", 47420030)],
)
def test_parameters_of_the_published_models(name, parameters):
    assert published_parameters(f"lite_detr/lite_dino_r50_{name}_36ep") == parameters


def test_key_aware_attention_is_switched_by_name():
    plain = published_parameters(PLAIN)
    switched = published_parameters(
        LITE,
        [
            f"model.transformer.{layer}._target_=sparse_detr.modeling.MSDeformAttn"
            for layer in ("encoder.layer.attention", "decoder.layer.cross_attention")
        ],
    )
    # 12 attentions: 256 * 128 + 128 of attention weights for 256 * 256 + 256 of query projection
    assert plain == switched == 47684222 + 12 * (32896 - 65792)


def test_shipped_configs_say_what_their_names_say():
    for name in [n for n in list_configs() if n.startswith("lite_detr/")]:
        lite = get_config(name).model.transformer.encoder
        high = lite.num_high_levels
        updates = lite.num_layers // lite.num_blocks
        assert f"_h{high}l{lite.num_levels - high}_{updates}p1x{lite.num_blocks}_" in name


def tiny(config=LITE, **encoder_options):
    cfg = shrink(get_config(config).model)
    cfg.transformer.encoder.update(encoder_options)
    torch.manual_seed(0)
    return instantiate(cfg)


def test_a_few_steps_on_one_image_reduce_the_loss():
    # faster, border proposals win the ranking for a while
    totals = total_losses(tiny().train(), [sample(64, 64)], steps=30, lr=1e-3)
    assert totals[-1] < 0.8 * totals[0]


def published_names(model):
    """A published state dict of ``model``: its own weights under the authors' names."""
    state = {}
    heads = {"class_heads.0.": "class_embed", "box_heads.0.": "bbox_embed"}
    for name, value in model.state_dict().items():
        for new, old in (
            ("backbone.stem.conv1.norm.", "backbone.0.body.bn1."),
            ("backbone.stem.", "backbone.0.body."),
            *((f"backbone.res{n + 1}.", f"backbone.0.body.layer{n}.") for n in (1, 2, 3, 4)),
            ("conv1.norm.", "bn1."),
            ("conv2.norm.", "bn2."),
            ("conv3.norm.", "bn3."),
            ("shortcut.norm.", "downsample.1."),
            ("shortcut.", "downsample.0."),
            ("low_ffn.linear1.", "linear12."),
            ("low_ffn.linear2.", "linear22."),
            ("low_ffn.norm.", "norm22."),
            ("self_attention.", "self_attn."),
            ("cross_attention.", "cross_attn."),
            (".attention.", ".self_attn."),
            ("self_norm.", "norm2."),
            ("cross_norm.", "norm1."),
            ("ffn.norm.", "norm2." if ".encoder." in name else "norm3."),
            ("ffn.linear", "linear"),
            ("position_mlp.", "ref_point_head."),
            ("transformer.denoising.label_embed.", "label_enc."),
            ("query_selection.content.", "tgt_embed."),
            ("proposal_head.projection.", "enc_output."),
            ("proposal_head.norm.", "enc_output_norm."),
            ("proposal_head.class_head.", "enc_out_class_embed."),
            ("proposal_head.box_head.", "enc_out_bbox_embed."),
        ):
            name = name.replace(new, old)
        if name.startswith("transformer.encoder"):
            name = name.replace(".norm.", ".norm1.")
        for part in ("conv", "norm"):
            prefix = f"neck.{part}s."
            if name.startswith(prefix):
                level, rest = name.removeprefix(prefix).split(".")
                name = f"input_proj.{level}.{'conv norm'.split().index(part)}.{rest}"
        for new, old in heads.items():
            if name.startswith(prefix := f"transformer.heads.{new}"):
                for layer in range(model.transformer.heads.num_layers):
                    rest = f"{old}.{layer}.{name.removeprefix(prefix)}"
                    state[rest] = state[f"transformer.decoder.{rest}"] = value
                break
        else:
            state[name] = value
    return state


def test_published_weights_are_recognised_and_complete():
    model = tiny()
    state = published_names(model)
    assert "transformer.encoder.layers.1.linear12.weight" in state
    assert "transformer.decoder.bbox_embed.1.layers.0.weight" in state
    converted, report = convert_state_dict(state, model)
    assert report.family == "dino" and report.complete
    for name, value in model.state_dict().items():
        assert torch.equal(converted[name], value), name


def test_the_number_of_high_levels_is_asked_for():
    """It leaves no trace in a checkpoint: the report says which value is in use."""
    for high in (2, 3):
        model = tiny(num_high_levels=high)
        _, report = convert_state_dict(published_names(model), model)
        assert [n for n in report.notes if f"num_high_levels={high} comes from the config" in n]


def test_unused_query_projections_are_dropped_and_missing_weights_are_not():
    """Published plain attention has query projections it never calls."""
    aware, plain = tiny(), tiny(PLAIN)
    state = published_names(plain)
    extra = {name: value for name, value in published_names(aware).items() if "query_proj" in name}
    assert len(extra) == 2 * 4
    _, report = convert_state_dict(state | extra, plain)
    assert report.complete and len(report.ignored) - 2 * 8 == len(extra)
    _, report = convert_state_dict(published_names(aware), plain)
    assert not report.complete and all("attention_weights" in name for name in report.missing)


def test_another_number_of_blocks_does_not_fit():
    _, report = convert_state_dict(published_names(tiny(num_blocks=2)), tiny(num_blocks=1))
    assert report.unexpected and all("layers.0.low_ffn" in name for name in report.unexpected)


def test_category_rows_are_picked_from_91_classes():
    cfg = shrink(get_config(LITE).model, num_classes=91)
    state = published_names(instantiate(cfg))
    model = instantiate(shrink(get_config(LITE).model, num_classes=80))
    converted, report = convert_state_dict(state, model)
    assert report.complete
    rows = [1, 13, 90]  # person, stop sign, toothbrush
    labels = converted["transformer.denoising.label_embed.weight"]
    assert labels.shape[0] == 81
    assert torch.equal(labels[[0, 11, 79]], state["label_enc.weight"][rows])
    heads = converted["transformer.heads.class_heads.0.bias"]
    assert torch.equal(heads[[0, 11, 79]], state["class_embed.0.bias"][rows])
