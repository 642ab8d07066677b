"""Replays of Salience DETR: targets and their loss, suppression of neighbours, the neck, whole models."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import instantiate
from torch import Tensor

from sparse_detr.modeling import FusionNeck
from sparse_detr.modeling.encoders.salience import salience_loss, salience_targets
from sparse_detr.modeling.proposals import CANDIDATES, first_of_neighbours
from sparse_detr.modeling.tokens import cell_centres

from . import dino, recipe
from .case import Case, Replay, stats

PREFIX = "transformer.neck."
NORM = "layer_blocks.0.conv1.1"  # whose statistics whole-model cases store


def run_labels(case: Case) -> None:
    """Soft targets and their loss, for boxes given in pixels."""
    config = case.config
    for name, layout in case.meta["layouts"].items():
        shapes = tuple(tuple(shape) for shape in layout["level_shapes"])
        boxes = [case.array(f"{name}.boxes{i}") for i in range(len(layout["n_boxes"]))]
        like = torch.zeros((), dtype=case.dtype)
        centres = [
            centre * centre.new_tensor(stride[::-1])
            for centre, stride in zip(cell_centres(shapes, like), layout["strides"])
        ]
        wanted = salience_targets(boxes, torch.cat(centres)[None], shapes, layout["limit_range"])
        noise, threshold = layout["noise_scale"], layout["noise_scale"] / 2
        if noise:
            wanted = torch.lerp(wanted, _noise(case, layout, shapes), noise)
        case.compare(f"{name}.targets", wanted, floor="targets")
        case.compare(f"{name}.num_pos", (wanted > threshold).sum().clamp(min=1))
        logits = recipe.normal(f"{case.name}.{name}.logits", (*wanted.shape, 1), case.meta["seed"])
        logits = case.tensor(2 * logits).squeeze(-1).requires_grad_()
        loss = salience_loss(
            logits, wanted, threshold=threshold, alpha=config["alpha"], gamma=config["gamma"]
        )
        case.compare(f"{name}.loss", loss, floor="loss")
        (gradient,) = torch.autograd.grad(loss, logits)
        case.compare(f"{name}.grad_rows", gradient[:, ::5], floor="grad_rows")


def _noise(case: Case, layout: dict, shapes) -> Tensor:
    """(B, N), drawn level by level and there image by image."""
    draws = iter(layout["noise_draws"])
    levels = [
        torch.stack(
            [
                case.tensor(recipe.uniform(next(draws), (h * w,), 0, 1, seed=case.meta["seed"]))
                for _ in layout["n_boxes"]
            ]
        )
        for h, w in shapes
    ]
    return torch.cat(levels, dim=1)


def run_neighbours(case: Case) -> None:
    """Proposals picked by score and neighbourhood."""
    for name, layout in case.meta["layouts"].items():
        shapes = tuple(tuple(shape) for shape in layout["spatial_shapes"])
        size, count = sum(h * w for h, w in shapes), layout["num_queries"]
        drawn = recipe.uniform(f"{case.name}.{name}.scores", (layout["batch"], size), 0, 1, case.meta["seed"])
        rank = drawn.argsort(1, kind="stable").argsort(1, kind="stable")
        for image, flat in enumerate(layout.get("flatten_below", ())):
            if flat is not None:
                rank[image] = np.arange(size)
        scores = case.tensor((rank + 1).astype(np.float32) / np.float32(size))
        order, kept = first_of_neighbours(
            scores,
            shapes,
            min(CANDIDATES * count, size),
            layout.get("iou_threshold", case.config["iou_threshold"]),
        )
        case.decide(f"{name}: candidates", order.shape[1] == layout["candidates"])
        case.decide(f"{name}: survivors", kept.tolist() == layout["survivors_per_image"])
        # Published code takes as many of every image as the image has that keeps fewest.
        case.compare(f"{name}.selected", order[:, : min(count, int(kept.min()))])


def run_neck(case: Case) -> None:
    """The fusion neck alone: inference, one training step, and its convolutions made one."""
    config = case.config
    neck = FusionNeck(
        embed_dim=config["channels"][0], num_levels=len(config["channels"]), groups=config["groups"]
    ).to(case.dtype)
    published = case.state_dict()
    state = {name.removeprefix(PREFIX): value for name, value in published.items()}
    assert state.keys() == neck.state_dict().keys()
    maps = [case.drawn(f"map{i}").requires_grad_() for i in range(len(config["spatial_shapes"]))]
    masks = [None] * len(maps)
    step = config["store_every"]

    def compare(kind: str, outputs: list[Tensor]) -> None:
        for i, output in enumerate(outputs):
            case.compare(f"{kind}_out{i}", output[:, ::step])
            case.compare(f"{kind}_stats{i}", torch.tensor(stats(output)[:5]))

    def evaluate(model) -> None:
        compare("eval", model.fuse(maps, masks))
        weight, bias = model.layer_blocks[0].bottlenecks[0].folded()
        case.compare("fused_weight", weight[:8])
        case.compare("fused_bias", bias)
        case.compare("fused_last_bias", model.pan_blocks[-1].bottlenecks[-1].folded()[1])
        case.skip("fused_error")  # of the case's own fused network; here "eval" is one

    def train(model) -> None:
        outputs = model.fuse(maps, masks)
        compare("train", outputs)
        for name in case.arrays:
            if name.startswith("after:"):
                case.compare(name, model.get_buffer(name.removeprefix("after:")))
        if not case.gradient_arrays():
            return
        total = torch.zeros((), dtype=case.dtype)
        for i, output in enumerate(outputs):
            drawn = recipe.normal(f"{case.name}.grad{i}", tuple(output.shape), case.meta["seed"])
            total = total + (output * case.tensor(drawn)).sum()
        leaves = {**published, **{f"map{i}": value for i, value in enumerate(maps)}}
        dino.compare_gradients(case, total, leaves)

    neck.eval()
    with torch.no_grad():
        Replay(neck).run(state, evaluate)
    neck.train()
    Replay(neck).run(state, train)


def run(case: Case) -> None:
    """Replay a whole-model case and compare everything it stores."""
    model = build_model(case.config).to(case.dtype)
    for name in ("pixel_mean", "pixel_std"):  # the model rounds them to float32
        getattr(model, name).copy_(torch.tensor(case.config[name], dtype=case.dtype).view(-1, 1, 1))
    dino.run_model(case, model, _compare)


def build_model(config: dict):
    """The model that the configuration of a case describes."""
    model = dino.model_config(config, "salience_detr")
    model.size_divisibility = config["size_divisibility"]
    model.transformer.encoder.update(
        num_layers=config["enc_layers"],
        level_ratios=config["level_filter_ratio"],
        layer_ratios=config["layer_filter_ratio"],
        num_objects=config["topk_sa"],
        num_places=config["max_num_embedding"],
        size_ranges=config["limit_range"],
        target_noise=config["salience_noise_scale"],
        loss_weight=config["salience_loss_weight"],
    )
    model.transformer.fusion.groups = config["rep_groups"]
    model.transformer.query_selection.nms_threshold = config["nms_iou_threshold"]
    model.criterion.update(config["criterion"])
    return instantiate(model)


def _compare(case: Case, model, output) -> None:
    tokens, encoded = output.tokens, output.encoded
    case.compare_rows("encoder_rows", encoded.memory)
    starts = torch.tensor([*tokens.level_starts, tokens.mask.shape[1]])
    level = torch.bucketize(encoded.selected[0], starts[1:], right=True)
    case.compare("level_token_nums", level.bincount(minlength=len(tokens.shapes)))
    head = model.transformer.proposal_head
    projected = head.project(output.memory, tokens.unproposed)
    case.compare("enc_score", head.score(head.class_head(projected)))
    queries = output.proposals.selected.shape[1]
    case.compare("num_candidates", torch.tensor(min(CANDIDATES * queries, tokens.mask.shape[1])))
    if model.training:
        case.compare("salience_target", encoded.intermediate["target"])
        norm = model.transformer.fusion.get_submodule(NORM)
        case.compare("bn_running_mean", norm.running_mean)
        case.compare("bn_running_var", norm.running_var)
