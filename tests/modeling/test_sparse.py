"""Sparse DETR's encoder: what it refreshes, what it leaves alone, how it learns to choose."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from sparse_detr.config import get_config
from sparse_detr.modeling.tokens import gather_tokens

from .tiny import SHAPES, feature_maps, masks, reveal, sample, shrink, tiny_model

SPARSE = "sparse_detr/sparse_detr_r50_30_50ep"
DENSE = "deformable_detr/deformable_detr_r50_efficient_50ep"


def sparse_model(seed=0, **encoder):
    """The shipped config with some of its encoder's settings changed, shrunk and built."""
    torch.manual_seed(seed)
    cfg = shrink(get_config(SPARSE).model)
    cfg.transformer.encoder.update(encoder)
    return reveal(instantiate(cfg))


def test_keep_ratio_1_is_the_dense_encoder():
    sparse = sparse_model(keep_ratio=1.0).double().eval().transformer
    dense = tiny_model(DENSE).double().eval().transformer
    dense.load_state_dict(sparse.state_dict(), strict=False)
    for valid in ([(1, 1), (1, 1)], [(1, 1), (0.6, 0.8)]):
        args = feature_maps(batch=2), masks(*valid)
        a, b = sparse(*args), dense(*args)
        kept = ~a.tokens.mask
        torch.testing.assert_close(a.encoded.memory[kept], b.encoded.memory[kept])
        torch.testing.assert_close(a.logits, b.logits)
        torch.testing.assert_close(a.boxes, b.boxes)


def test_no_keep_ratio_is_the_dense_encoder_with_auxiliary_heads():
    model = sparse_model(keep_ratio=None)
    dense = tiny_model(DENSE).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    maps = [m.float() for m in feature_maps()]
    a, b = model.eval().transformer(maps, masks((1, 1))), dense.transformer(maps, masks((1, 1)))
    assert torch.equal(a.logits, b.logits) and a.encoded.selected is None
    losses = model.train()([sample(64, 80)])
    assert "loss_class_enc_0" in losses and "loss_mask_prediction" not in losses


def test_only_an_images_own_budget_of_valid_tokens_is_refreshed():
    transformer = sparse_model(keep_ratio=0.25).double().eval().transformer
    output = transformer(feature_maps(batch=3), masks((1, 1), (0.5, 0.75), (1, 0.3)))
    encoded, tokens = output.encoded, output.tokens
    valid = (~tokens.mask).sum(1)
    budgets = (valid * 0.25).long() + 1
    assert len(set(budgets.tolist())) == 3
    assert encoded.selected.shape == (3, int(budgets.max()))
    assert torch.equal(encoded.selected_mask.sum(1), budgets)

    changed = (encoded.memory != tokens.features).any(-1)  # (B, N)
    wanted = torch.zeros_like(changed)
    for image, budget in enumerate(budgets.tolist()):
        wanted[image, encoded.selected[image, :budget]] = True
    assert torch.equal(changed, wanted)
    assert not (changed & tokens.mask).any()


def test_inference_updates_its_own_copy_of_the_features():
    """Without gradients the layers write in place; the result is the same, the input is kept."""
    transformer = sparse_model().double().eval().transformer
    args = feature_maps(batch=2), masks((1, 1), (0.5, 0.75))
    wanted = transformer(*args)
    with torch.no_grad():
        found = transformer(*args)
    assert torch.equal(found.encoded.memory, wanted.encoded.memory)
    assert torch.equal(found.tokens.features, wanted.tokens.features)


def test_bfloat16_autocast_trains():
    model = sparse_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([sample(64, 80), sample(50, 90)])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_the_best_tokens_are_chosen_and_come_first():
    output = sparse_model().eval().transformer([m.float() for m in feature_maps(2)], masks((1, 1), (0.6, 1)))
    encoded = output.encoded
    ranked = gather_tokens(encoded.scores, encoded.selected)
    assert (ranked.diff(dim=1) <= 0).all()
    rest = encoded.scores.clone().scatter_(1, encoded.selected, float("-inf"))
    assert (rest.amax(1) <= ranked[:, -1]).all()


def test_the_order_of_visits_changes_nothing(monkeypatch):
    """Neither what is chosen and refreshed, nor which losses and gradients follow."""

    def run():
        model = sparse_model(keep_ratio=0.25).double().train()
        losses = model([sample(64, 80), sample(50, 90)])
        sum(losses.values()).backward()
        gradient = model.transformer.encoder.layers[0].attention.value_proj.weight.grad
        encoded = model.eval().transformer(feature_maps(2), masks((1, 1), (0.5, 0.75))).encoded
        return losses, gradient, encoded

    by_place = run()
    monkeypatch.setattr(
        "sparse_detr.modeling.selection.visiting_order",
        lambda ranked, tokens: torch.arange(ranked.shape[1]).expand_as(ranked),
    )
    best_first = run()
    assert not torch.equal(*(each[2].kept.index for each in (by_place, best_first)))
    assert torch.equal(by_place[2].selected, best_first[2].selected)
    assert torch.equal(by_place[2].selected_mask, best_first[2].selected_mask)
    torch.testing.assert_close(by_place[2].memory, best_first[2].memory)
    torch.testing.assert_close(by_place[0], best_first[0])
    torch.testing.assert_close(by_place[1], best_first[1])


@pytest.mark.parametrize("mask_padding", [True, False])
def test_padding_leaves_scores_alone_with_masked_statistics_only(mask_padding):
    transformer = sparse_model(mask_padding=mask_padding).double().eval().transformer
    maps = feature_maps()
    larger, larger_masks = [], []
    for m in maps:
        h, w = m.shape[-2:]
        padded = torch.full((1, 32, h + 2, 2 * w), 3.0, dtype=torch.double)
        padded[:, :, :h, :w] = m
        mask = torch.ones(1, h + 2, 2 * w, dtype=torch.bool)
        mask[:, :h, :w] = False
        larger.append(padded)
        larger_masks.append(mask)
    alone, padded = transformer(maps, masks((1, 1))), transformer(larger, larger_masks)
    kept = ~padded.tokens.mask[0]
    scores, wanted = padded.encoded.scores[0, kept], alone.encoded.scores[0]
    if mask_padding:
        torch.testing.assert_close(scores, wanted)
        torch.testing.assert_close(padded.encoded.memory[0, kept], alone.encoded.memory[0])
        assert padded.encoded.selected.shape == alone.encoded.selected.shape
    else:
        assert not torch.allclose(scores, wanted)


def test_results_follow_the_order_of_the_images():
    transformer = sparse_model().double().eval().transformer
    maps, valid = feature_maps(batch=2), masks((1, 1), (0.5, 0.75))
    a = transformer(maps, valid)
    b = transformer([m.flip(0) for m in maps], [m.flip(0) for m in valid])
    torch.testing.assert_close(a.logits, b.logits.flip(0))
    torch.testing.assert_close(a.encoded.memory, b.encoded.memory.flip(0))


@pytest.mark.parametrize("scoring", ["attention_map", "objectness"])
@pytest.mark.parametrize("num_boxes", [2, 0])
def test_a_training_step_reaches_every_trained_parameter(scoring, num_boxes):
    """Also when no image of the batch has an object."""
    model = sparse_model(scoring=scoring, keep_ratio=0.2).train()
    batch = [sample(70, 90, num_boxes, seed=1), sample(64, 120, num_boxes, seed=2)]
    with EventStorage() as storage:
        losses = model(batch)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    suffixes = {"", "_0", "_enc", "_enc_0"} | ({"_backbone"} if scoring == "objectness" else set())
    names = {f"loss_{kind}{suffix}" for kind in ("class", "bbox", "giou") for suffix in suffixes}
    logged = storage.latest()
    if scoring == "attention_map":
        names.add("loss_mask_prediction")
        shares = {k: v for k, (v, _) in logged.items() if k.startswith("corr_mask_attn_map_dec_")}
        assert {k.rsplit("_")[-1] for k in shares} == {"all", "0", "1", "2", "3"}
        assert all(0 <= share <= 1 for share in shares.values())
    assert set(losses) == names


def test_the_scoring_loss_trains_the_scorer_and_what_it_reads():
    model = sparse_model(keep_ratio=0.2).train()
    model([sample(64, 96)])["loss_mask_prediction"].backward()
    reached = {
        ".".join(name.split(".")[:2])
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert reached >= {"transformer.proposal_head", "neck.convs", "backbone.res3"}
    assert not reached & {"transformer.decoder", "transformer.heads"}
    assert all(p.grad.abs().max() > 0 for p in model.transformer.encoder.scorer.parameters())


def test_a_few_steps_lower_the_scoring_loss():
    model = sparse_model(keep_ratio=0.2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch, losses = [sample(64, 96)], []
    for _ in range(20):
        found = model(batch)
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        losses.append(float(found["loss_mask_prediction"].detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_inference_computes_neither_auxiliary_predictions_nor_decoder_samples():
    output = sparse_model().eval().transformer([m.float() for m in feature_maps()], masks((1, 1)))
    assert not output.encoded.predictions and not output.decoded.samples


def test_the_keep_ratio_of_a_built_model_can_be_changed():
    model = sparse_model(keep_ratio=0.5).eval()
    encoder = model.transformer.encoder
    maps = [m.float() for m in feature_maps()]
    num_tokens = sum(h * w for h, w in SHAPES)
    for ratio in (0.5, 0.1, 1.0):
        encoder.keep_ratio = ratio
        selected = model.transformer(maps, masks((1, 1)), has_padding=False).encoded.selected
        assert selected.shape[1] == min(int(num_tokens * ratio) + 1, num_tokens)
    other = sparse_model(seed=1, keep_ratio=0.1)
    other.load_state_dict(model.state_dict())  # the weights fit any ratio
    overridden = get_config(SPARSE, ["model.transformer.encoder.keep_ratio=0.2"])
    assert instantiate(shrink(overridden.model)).transformer.encoder.keep_ratio == 0.2


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01])
def test_a_keep_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"keep_ratio={ratio} must lie in \(0, 1\]"):
        sparse_model(keep_ratio=ratio)


def test_a_model_without_a_scoring_network_stays_dense():
    encoder = sparse_model(keep_ratio=None).transformer.encoder
    with pytest.raises(ValueError, match="built without one"):
        encoder.keep_ratio = 0.3


def test_an_unknown_scoring_is_refused():
    with pytest.raises(ValueError, match="scoring='dam' is not one of attention_map, objectness"):
        sparse_model(scoring="dam")


def test_counting_tokens_does_not_need_the_device():
    """The number of kept tokens is a Python int; masks on the CPU give it without a wait."""
    model = sparse_model().eval()
    images = model.preprocess([sample(50, 61, annotated=False), sample(47, 77, annotated=False)])
    tokens = model.detect(images).tokens
    assert tokens.counts is not None
    assert tokens.valid_counts == tuple((~tokens.mask).sum(1).tolist())
    assert tokens.counts[0] != tokens.counts[1]
