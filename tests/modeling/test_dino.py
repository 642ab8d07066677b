"""DINO as a base: mixed queries, denoising, look forward twice, both published flavours."""

import pytest
import torch
from detectron2.config import instantiate
from torch.testing import assert_close

from sparse_detr.config import get_config
from sparse_detr.engine.convert import convert_state_dict

from .tiny import reveal, sample, shrink, total_losses

DINO = "dino/dino_r50_4scale_12ep"
OFFICIAL = "dino/dino_official_r50_4scale_12ep"
FIVE_SCALES = "dino/dino_r50_5scale_12ep"
SPARSE = "dino/sparse_dino_r50_4scale_12ep"


def dino(config=DINO, seed=0, overrides=()):
    """A shipped config, shrunk and built, with nothing hidden behind zero weights."""
    torch.manual_seed(seed)
    return reveal(instantiate(shrink(get_config(config, overrides).model)))


def names(*suffixes):
    return {f"loss_{kind}{s}" for kind in ("class", "bbox", "giou") for s in suffixes}


LOSSES = names("", "_0", "_enc", "_dn", "_dn_0")


@pytest.mark.parametrize("config", [DINO, OFFICIAL, FIVE_SCALES, SPARSE])
def test_a_training_step_reaches_every_trained_parameter(config):
    model = dino(config).train()
    losses = model([sample(70, 90, seed=1), sample(64, 120, num_boxes=3, seed=2)])
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    extra = names("_enc_0") | {"loss_mask_prediction"} if config == SPARSE else set()
    assert set(losses) == LOSSES | extra


@pytest.mark.parametrize("config", [DINO, SPARSE])
def test_a_few_steps_on_one_image_reduce_the_loss(config):
    totals = total_losses(dino(config).train(), [sample(64, 64)], steps=32, lr=2e-3)
    assert sum(totals[-4:]) / 4 < 0.8 * totals[0]


@pytest.mark.parametrize("config", [DINO, SPARSE])
@pytest.mark.parametrize("counts", [(0,), (0, 0), (0, 2), (1,), (200,), (200, 0)])
def test_any_number_of_objects_trains(config, counts):
    model = dino(config).train()
    losses = model([sample(40, 56, num_boxes=n, seed=i) for i, n in enumerate(counts)])
    assert LOSSES <= set(losses) and all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if sum(counts) == 0:
        assert all(losses[name] == 0 for name in names("_dn", "_dn_0"))
        assert (model.transformer.denoising.label_embed.weight.grad == 0).all()


@pytest.mark.parametrize("size", [(33, 200), (16, 16), (1, 40)])
def test_images_with_fewer_tokens_than_queries(size):
    model = dino()
    assert all(v.isfinite() for v in model.train()([sample(*size, num_boxes=1)]).values())
    with torch.no_grad():
        (result,) = model.eval()([sample(*size, annotated=False)])
    assert result["instances"].pred_boxes.tensor.isfinite().all()


def test_detections_do_not_see_the_denoising_queries():
    """What the labels are must not leak into the detector's own predictions."""
    model = dino().train()
    batch = [sample(64, 96, seed=1), sample(64, 80, num_boxes=3, seed=2)]
    images, targets = model.preprocess(batch), model.targets(batch)
    output = model.detect(images, targets)
    size = output.groups[0].size
    assert size > 0 and output.decoded.logits[0].shape[1] == size + 8
    with_denoising = [x[:, size:] for x in output.decoded.boxes + output.decoded.logits]
    model.transformer.denoising = None
    output = model.detect(images)
    for a, b in zip(with_denoising, output.decoded.boxes + output.decoded.logits):
        assert_close(a, b)


def test_the_denoising_loss_is_a_mean_over_its_groups():
    """Twice as many groups of the same noise-free queries leave box losses where they are."""
    losses = []
    for count in (2, 8):
        model = dino(
            overrides=[
                f"model.transformer.denoising.num_queries={count}",
                "model.transformer.denoising.label_noise_ratio=0.0",
                "model.transformer.denoising.box_noise_scale=0.0",
            ]
        ).train()
        losses.append(model([sample(64, 64, num_boxes=2)]))
    for name in ("loss_bbox_dn", "loss_giou_dn", "loss_bbox_dn_0"):
        assert_close(losses[0][name], losses[1][name])


@pytest.mark.parametrize("twice", [True, False])
def test_looking_forward_twice_lets_a_loss_reach_the_layer_before(twice):
    model = dino(overrides=[f"model.transformer.decoder.look_forward_twice={twice}"]).train()
    model([sample(64, 64)])["loss_bbox"].backward()  # of the second, last layer
    first = model.transformer.heads.box_heads[0].layers[-1].weight.grad
    assert (first is not None and first.abs().max() > 0) == twice


def test_contents_are_learned_or_the_chosen_tokens_without_gradient():
    learned, taken = dino(), dino(overrides=["model.transformer.query_selection.learned_content=false"])
    taken.load_state_dict(learned.state_dict(), strict=False)
    image = [sample(64, 64, annotated=False)]
    contents = []
    for model in (learned.eval(), taken.eval()):
        seen = []
        model.transformer.decoder.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model.detect(model.preprocess(image))
        contents.append(seen[0].content[0])
    assert torch.equal(contents[0], learned.transformer.query_selection.content.weight)
    assert not contents[1].requires_grad and not torch.equal(*contents)
    assert "transformer.query_selection.content.weight" not in taken.state_dict()


def test_padding_does_not_change_memory_and_proposals():
    """The decoder's position codes do change: they are of boxes on the padded map, as published."""
    transformer = dino().double().eval().transformer
    transformer.query_selection.skip_invalid = True
    shapes = ((12, 16), (6, 8), (3, 4), (2, 2))
    maps = [torch.randn(1, 32, *shape, dtype=torch.double) for shape in shapes]
    masks = [torch.zeros(1, *shape, dtype=torch.bool) for shape in shapes]
    alone = transformer(maps, masks, has_padding=False)
    larger, larger_masks = [], []
    for m, (h, w) in zip(maps, shapes):
        larger.append(torch.randn(1, 32, h + 3, 2 * w, dtype=torch.double))
        larger[-1][:, :, :h, :w] = m
        larger_masks.append(torch.ones(1, h + 3, 2 * w, dtype=torch.bool))
        larger_masks[-1][:, :h, :w] = False
    padded = transformer(larger, larger_masks)
    kept = ~padded.tokens.mask[0]
    assert_close(padded.encoded.memory[0, kept], alone.encoded.memory[0])
    assert_close(padded.proposals.logits, alone.proposals.logits)
    assert_close(padded.proposals.boxes, alone.proposals.boxes)


def test_the_official_flavour_shares_decoder_heads_and_keeps_the_proposals_own():
    detrex, official = dino().transformer, dino(OFFICIAL).transformer
    assert len(detrex.heads.class_heads) == len(detrex.heads.box_heads) == 2
    assert len(official.heads.class_heads) == len(official.heads.box_heads) == 1
    assert official.proposal_head.class_head is not official.heads.class_heads[0]
    assert official.denoising.label_embed.num_embeddings == 3 + 1
    assert (official.position.temperature, official.position.offset) == (20.0, 0.0)
    assert (detrex.position.temperature, detrex.position.offset) == (10000.0, -0.5)


def test_giou_and_logits_have_the_published_guards():
    model = dino()
    assert model.criterion.giou_eps == model.criterion.matcher.giou_eps == 1e-6
    assert model.transformer.decoder.eps == model.transformer.denoising.eps == 1e-3
    assert model.criterion.weights == {"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    assert model.max_detections == 300


# ------------------------------------------------------------------------------ published weights

DETREX_NAMES = {
    "neck.convs.0.conv.weight": "neck.convs.0.weight",
    "neck.convs.2.norm.bias": "neck.norms.2.bias",
    "neck.extra_convs.0.conv.weight": "neck.convs.3.weight",
    "neck.extra_convs.0.norm.weight": "neck.norms.3.weight",
    "transformer.level_embeds": "transformer.level_embed",
    "transformer.tgt_embed.weight": "transformer.query_selection.content.weight",
    "transformer.encoder.layers.1.attentions.0.value_proj.weight": "transformer.encoder.layers.1.attention.value_proj.weight",
    "transformer.encoder.layers.1.ffns.0.layers.0.0.bias": "transformer.encoder.layers.1.ffn.linear1.bias",
    "transformer.encoder.layers.1.norms.1.weight": "transformer.encoder.layers.1.ffn.norm.weight",
    "transformer.decoder.layers.0.attentions.0.attn.in_proj_weight": "transformer.decoder.layers.0.self_attention.in_proj_weight",
    "transformer.decoder.layers.0.norms.0.weight": "transformer.decoder.layers.0.self_norm.weight",
    "transformer.decoder.layers.0.norms.1.weight": "transformer.decoder.layers.0.cross_norm.weight",
    "transformer.decoder.ref_point_head.layers.0.weight": "transformer.decoder.position_mlp.layers.0.weight",
    "class_embed.0.weight": "transformer.heads.class_heads.0.weight",
    "class_embed.2.weight": "transformer.proposal_head.class_head.weight",  # after two layers
    "bbox_embed.1.layers.2.bias": "transformer.heads.box_heads.1.layers.2.bias",
    "label_enc.weight": "transformer.denoising.label_embed.weight",
}
ALIASES = [
    "transformer.decoder.class_embed.0.weight",
    "transformer.decoder.bbox_embed.1.layers.2.bias",
]


def published(model):
    """Some of detrex's names with values of the model's shapes, and names of the same tensors."""
    expected = model.state_dict()
    state = {name: torch.randn_like(expected[own]) for name, own in DETREX_NAMES.items()}
    for name in ALIASES:
        state[name] = state[name.removeprefix("transformer.decoder.")]
    return state


def test_detrex_names_are_converted_and_second_names_are_dropped():
    model = dino()
    state = published(model)
    converted, report = convert_state_dict(state, model)
    assert report.family == "detrex" and not report.unexpected
    assert {k: converted[v] is state[k] for k, v in DETREX_NAMES.items()} == dict.fromkeys(DETREX_NAMES, True)
    assert sorted(report.ignored) == sorted(ALIASES)
    assert set(report.missing) == set(model.state_dict()) - set(DETREX_NAMES.values())


def test_a_model_without_denoising_takes_the_same_weights():
    model = dino(overrides=["model.transformer.denoising=null"])
    state = published(dino())
    _, report = convert_state_dict(state, model)
    assert report.ignored["transformer.denoising.label_embed.weight"] == "not used by this model"
    assert not report.unexpected


def test_per_layer_heads_do_not_fit_a_model_that_shares_them():
    model = dino(OFFICIAL)
    state = published(dino())
    state["bbox_embed.0.layers.2.bias"] = torch.randn(4)
    with pytest.raises(ValueError, match="heads per layer"):
        convert_state_dict(state, model)
