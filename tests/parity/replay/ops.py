"""Replays of single ops and layers: deformable attention and the decoder attention map."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_detr.kernels import attention_map_splat, ms_deform_attn
from sparse_detr.modeling import MSDeformAttn

from .case import Case


def run_core(case: Case) -> None:
    """The raw op: value, locations, weights and an upstream gradient."""
    shapes = _shapes(case)
    value, locations, weights = (case.drawn(k) for k in ("value", "locations", "weights"))
    weights = weights / weights.sum((-1, -2), keepdim=True)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    output = ms_deform_attn(value, shapes, locations, weights)
    case.compare("output", output)
    names = ("value", "locations", "weights")
    _compare_gradients(case, output, dict(zip(names, inputs)))


def run_layer(case: Case) -> None:
    """``MSDeformAttn`` with its projections."""
    config = case.config
    layer = MSDeformAttn(
        embed_dim=config["d_model"],
        num_heads=config["n_heads"],
        num_levels=config["n_levels"],
        num_points=config["n_points"],
    ).to(case.dtype)
    layer.load_state_dict(
        {name.removeprefix("attn."): value.detach() for name, value in case.state_dict().items()}
    )
    query, value = (case.drawn(name).requires_grad_() for name in ("query", "value"))
    # A box reference is described as two draws: centres, then sizes.
    reference = case.drawn("reference")
    if reference.shape[-1] != config["reference_dim"]:
        reference = torch.cat([reference, case.drawn("reference", 1)], dim=-1)
    reference = reference.requires_grad_()
    mask = case.array("padding_mask") if case.stores("padding_mask") else None
    output, _ = layer(query, reference, value, _shapes(case), mask)
    case.compare("output", output)
    inputs = {"query": query, "value": value, "reference": reference}
    inputs.update({f"attn.{name}": p for name, p in layer.named_parameters()})
    _compare_gradients(case, output, inputs)


def run_attention_map(case: Case) -> None:
    """The decoder attention map, its target and the scoring loss of Sparse DETR."""
    from sparse_detr.modeling.encoders.dam import attention_map_target, scoring_loss

    shapes = _shapes(case)
    locations, weights = case.drawn("locations"), case.drawn("weights")
    weights = weights / weights.sum((-1, -2), keepdim=True)
    layers = [attention_map_splat([at], [w], shapes) for at, w in zip(locations.unbind(1), weights.unbind(1))]
    attention_map = attention_map_splat(locations.unbind(1), weights.unbind(1), shapes)
    torch.testing.assert_close(attention_map, torch.stack(layers).sum(0))
    case.compare("dam_map", attention_map)
    case.compare(
        "dam_layer0_head0", attention_map_splat([locations[:, 0, :, :1]], [weights[:, 0, :, :1]], shapes)
    )
    if case.stores("padding_mask"):
        mask = case.array("padding_mask")
    else:
        mask = torch.zeros_like(attention_map, dtype=torch.bool)
    counts = ((~mask).sum(1) * torch.tensor(case.config["rho"], dtype=torch.float32)).int() + 1
    case.compare("sparse_token_nums", counts)
    target = attention_map_target(attention_map, mask, torch.arange(int(counts.max())) < counts[:, None])
    case.compare("dam_target", target)
    logits = case.drawn("logits").requires_grad_()
    masked = torch.where(mask, logits.min(), logits)
    loss = scoring_loss(masked, target)
    case.compare("loss", loss.reshape(1))
    (gradient,) = torch.autograd.grad(loss, logits)
    case.compare("grad_logits", gradient)


def _shapes(case: Case) -> tuple[tuple[int, int], ...]:
    return tuple(tuple(shape) for shape in case.config["spatial_shapes"])


def _compare_gradients(case: Case, output: Tensor, inputs: dict[str, Tensor]) -> None:
    upstream = case.drawn_like("grad_output", output)
    gradients = torch.autograd.grad((output * upstream).sum(), list(inputs.values()))
    for name, gradient in zip(inputs, gradients):
        if not case.stores(f"grad:{name}"):
            continue
        stored = case.arrays[f"grad:{name}"]
        if stored.shape != tuple(gradient.shape):  # "stored flattened with stride s"
            step = int(case.meta["outputs"][f"grad:{name}"].rsplit("stride", 1)[1].split()[0])
            gradient = gradient.flatten()[::step]
        case.compare(f"grad:{name}", gradient)
