"""Recomputed activations: the same training in less memory, whatever the encoder."""

import pytest
import torch
from detectron2.config import instantiate

from sparse_detr.config import get_config
from sparse_detr.modeling.layers import TransformerLayer

from .tiny import sample, shrink

CONFIGS = (
    "deformable_detr/deformable_detr_r50_50ep",
    "dino/dino_r50_4scale_12ep",
    "sparse_detr/sparse_detr_r50_30_50ep",
    "focus_detr/focus_detr_r50_4scale_12ep",
    "salience_detr/salience_detr_r50_4scale_12ep",
    "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep",
    "rt_detr/hybrid_dino_r50_4scale_12ep",
)


def model_of(config, recompute, encoder_config=None):
    """With dropout, which the second forward pass must repeat."""
    torch.manual_seed(0)
    cfg = get_config(config, [f"model.transformer.activation_checkpointing={recompute}"])
    shrink(cfg.model)
    for part in ("encoder", "decoder"):
        cfg.model.transformer[part].layer.dropout = 0.1
    if encoder_config:
        attention = get_config(encoder_config).model.transformer.decoder.layer.cross_attention
        attention.update(num_heads=4, num_points=2)
        cfg.model.transformer.decoder.layer.cross_attention = attention
    return instantiate(cfg.model)


def step(model):
    """Losses, gradients, and the bytes that the forward pass kept for the backward pass."""
    model.double()
    batch = [sample(56, 80, 3), sample(64, 48, 1)]
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def inputs(module, args):
        if module.activation_checkpointing:  # held by the layer itself
            for x in args:
                if isinstance(x, torch.Tensor):
                    keep(x)

    hooks = [m.register_forward_pre_hook(inputs) for m in model.modules() if isinstance(m, TransformerLayer)]
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    for hook in hooks:
        hook.remove()
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, sum(kept.values())


@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_gradients_in_less_memory(config):
    losses, gradients, everything = step(model_of(config, False))
    again, recomputed, kept = step(model_of(config, True))
    assert again.keys() == losses.keys() and recomputed.keys() == gradients.keys()
    for name in losses:
        torch.testing.assert_close(again[name], losses[name], rtol=1e-12, atol=1e-12)
    for name in gradients:
        torch.testing.assert_close(recomputed[name], gradients[name], rtol=1e-10, atol=1e-12)
    assert kept < 0.75 * everything, f"{kept} of {everything} bytes"


def test_recorded_samples_of_key_aware_attention():
    """Their weights are found by a gradient inside of the layer: a case of its own."""
    parts = CONFIGS[2], CONFIGS[4]
    losses, gradients, _ = step(model_of(parts[0], False, parts[1]))
    again, recomputed, _ = step(model_of(parts[0], True, parts[1]))
    torch.testing.assert_close(again, losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recomputed, gradients, rtol=1e-10, atol=1e-12)


def test_evaluation_has_nothing_to_recompute():
    model = model_of(CONFIGS[0], True).eval()
    calls = []
    layer = model.transformer.encoder.layers[0]
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model([sample(40, 40)])
    assert len(calls) == 1
    model.train()
    sum(model([sample(40, 40)]).values()).backward()
    assert len(calls) == 3
