"""Base x encoder: every encoder runs on every base, also where no paper put it."""

import pytest
import torch
from detectron2.config import instantiate

from sparse_detr.config import get_config

from .tiny import reveal, sample, shrink

BASES = {
    "deformable_detr": "deformable_detr_two_stage",
    "dino": "dino",
    "h_deformable_detr": "hdetr",
}
ENCODERS = {  # and a loss that only this encoder has, if any
    "dense": None,
    "sparse": "loss_mask_prediction",
    "focus": "loss_foreground",
    "lite": None,
    "salience": "loss_salience",
    "rt_detr": None,
}


def composed(base, encoder, key_aware=None):
    """The base's model config with the encoder's config in the encoder's place.

    ``key_aware``: whether the decoder's attention is; by default together with Lite DETR's encoder.
    """
    model = get_config(f"models/{BASES[base]}.py").model
    if encoder != "dense":
        parts = get_config(f"encoders/{encoder}.py")
        model.transformer.encoder = parts.encoder
        model.transformer.fusion = parts.get("fusion")
    if encoder == "lite" if key_aware is None else key_aware:
        attention = get_config("encoders/lite.py").attention
        model.transformer.decoder.layer.cross_attention = attention
    return model


def compose(base, encoder, key_aware=None):
    torch.manual_seed(0)
    return reveal(instantiate(shrink(composed(base, encoder, key_aware))))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("base", BASES)
def test_encoder_layers_are_as_the_bases_decoder_layers(base, encoder):
    """In full size: a number copied from another base would hide in a shrunk model."""
    transformer = composed(base, encoder).transformer
    encoder_layer, decoder_layer = (
        instantiate(transformer.encoder.layer),
        instantiate(transformer.decoder.layer),
    )

    def numbers(layer, attention):
        return {
            "embed_dim": layer.ffn.linear1.in_features,
            "ffn_dim": layer.ffn.linear1.out_features,
            "dropout": {part.p for part in layer.modules() if isinstance(part, torch.nn.Dropout)},
            "heads": {part.num_heads for part in layer.modules() if hasattr(part, "num_heads")},
            "points": getattr(attention, "num_points", None),
            "levels": getattr(attention, "num_levels", None),
        }

    wanted = numbers(decoder_layer, decoder_layer.cross_attention)
    if not hasattr(encoder_layer.attention, "num_points"):  # no deformable attention
        wanted.update(points=None, levels=None)
    assert numbers(encoder_layer, encoder_layer.attention) == wanted


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("base", BASES)
def test_it_trains_and_evaluates(base, encoder):
    model = compose(base, encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = [sample(96, 90, seed=1), sample(64, 120, num_boxes=3, seed=2)]
    model.train()
    for _ in range(4):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
    own = set(losses) & {*ENCODERS.values()}
    assert own == {ENCODERS[encoder]} - {None}
    assert ("loss_class_dn" in losses) == (base == "dino")
    assert ("loss_class_one2many" in losses) == (base == "h_deformable_detr")

    model.eval()
    with torch.no_grad():
        results = [r["instances"] for r in model(batch)]
    for result, entry in zip(results, batch):
        assert result.image_size == (entry["height"], entry["width"])
        assert 0 < len(result) <= model.max_detections
        assert result.pred_boxes.tensor.isfinite().all() and (result.scores.diff() <= 0).all()


def test_a_key_aware_decoder_can_teach_which_tokens_to_keep():
    """Sparse DETR's target is where the decoder looks, whichever attention it looks with."""
    model = compose("dino", "sparse", key_aware=True).train()
    losses = model([sample(96, 90)])
    losses["loss_mask_prediction"].backward()
    scorer = model.transformer.encoder.scorer
    assert all(p.grad.isfinite().all() and p.grad.any() for p in scorer.parameters())
