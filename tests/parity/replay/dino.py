"""Replays of DINO and Focus-DETR (detrex): denoising, label assignment, whole models."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from sparse_detr.config import get_config
from sparse_detr.modeling import ContrastiveDenoising
from sparse_detr.modeling.denoising import Noise
from sparse_detr.modeling.encoders.foreground import foreground_loss, foreground_targets
from sparse_detr.modeling.matcher import Assignment, Target
from sparse_detr.modeling.postprocess import detections, top_detections
from sparse_detr.modeling.proposals import Queries, QueryGroup

from . import recipe
from .case import Case, Replay, stats
from .deformable import compare_tokens, convert

FEATURES = {"res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
EVERY = 7  # denoising queries are stored in steps of this


def build_model(config: dict):
    """The model that the configuration of a detrex case describes."""
    return instantiate(model_config(config, "dino"))


def model_config(config: dict, base: str):
    """``models/<base>.py`` with the settings of a case in it."""
    model = get_config(f"models/{base}.py").model
    model.num_classes = config["num_classes"]
    model.pixel_mean, model.pixel_std = config["pixel_mean"], config["pixel_std"]
    model.max_detections = config["select_box_nums_for_evaluation"]
    levels = config["num_feature_levels"]
    model.in_features = list(FEATURES)[-min(levels - 1, 4) :]
    model.backbone.out_features = list(model.in_features)
    model.backbone.stages.depth = int(config["backbone"].split("ResNet-")[1].split()[0])
    model.neck.in_channels = [FEATURES[name] for name in model.in_features]

    transformer = model.transformer
    transformer.num_levels = levels
    transformer.embed_dim = config["embed_dim"]
    transformer.position.update(temperature=config["temperature"], offset=config["offset"])
    transformer.decoder.num_layers = config["dec_layers"]
    transformer.decoder.look_forward_twice = config.get("look_forward_twice", True)
    transformer.decoder.layer.update(
        num_heads=config["nheads"], ffn_dim=config["feedforward_dim"], dropout=config["dropout"]
    )
    transformer.decoder.layer.cross_attention.num_heads = config["nheads"]
    if config["system"] == "focus_detr":
        encoder = get_config("encoders/focus.py").encoder
        encoder.update(
            num_layers=config["enc_layers"],
            keep_ratio=config["focus_rho"],
            layer_ratios=config["cascade_set"],
            num_objects=config["topk_sa"],
            strides=config["strides"],
            size_ranges=config["limit_range"],
            loss_weight=config["select_loss_weight"],
        )
        transformer.encoder = encoder
    else:
        transformer.encoder.num_layers = config["enc_layers"]
        transformer.encoder.layer.update(ffn_dim=config["feedforward_dim"], dropout=config["dropout"])
        transformer.encoder.layer.attention.num_heads = config["nheads"]
    transformer.query_selection.update(
        num_queries=config["num_queries"], learned_content=config.get("learnt_init_query", True)
    )
    transformer.denoising.update(
        num_queries=config["dn_number"],
        label_noise_ratio=config["label_noise_ratio"],
        box_noise_scale=config["box_noise_scale"],
    )
    matcher = config["matcher"]
    model.criterion.matcher.update(matcher)
    model.criterion.update(alpha=matcher["alpha"], gamma=matcher["gamma"])
    return model


def recorded_noise(case: Case, denoising: ContrastiveDenoising):
    """A ``draw`` that returns the case's random numbers; what it did not draw changes nothing."""

    def recorded(name: str, default: Tensor) -> Tensor:
        return case.array(name).to(default.dtype) if name in case.arrays else default

    def draw(rows: int, like: Tensor) -> Noise:
        chance = recorded("dn_label_p", like.new_ones(rows))
        assert len(chance) == rows, f"{rows} denoising queries, the case has {len(chance)}"
        # detrex draws new labels only for the rows it replaces, and signs as 0 or 1.
        label = torch.zeros(rows, dtype=torch.long)
        flipped = chance < denoising.label_noise_ratio * 0.5
        if len(case.arrays.get("dn_label_new", ())) == rows:
            flipped[:] = True
        label[flipped] = recorded("dn_label_new", label[flipped])
        sign = recorded("dn_box_sign", torch.ones(rows, 4, dtype=torch.long)) * 2 - 1
        return Noise(chance, label, sign, recorded("dn_box_rand", like.new_zeros(rows, 4)))

    return draw


def run_denoising(case: Case) -> None:
    """Contrastive denoising queries alone."""
    config = case.config
    denoising = ContrastiveDenoising(
        embed_dim=config["embed_dim"],
        num_classes=config["num_classes"],
        num_queries=config["dn_number"],
        label_noise_ratio=config["label_noise_ratio"],
        box_noise_scale=config["box_noise_scale"],
    ).to(case.dtype)
    denoising.label_embed.weight.data = case.state_dict()["label_enc.weight"].detach()
    denoising.draw = recorded_noise(case, denoising)
    targets = case.targets([(1, 1)] * len(config["n_targets"]))
    size = config["num_queries"]
    content = torch.zeros(len(targets), size, config["embed_dim"], dtype=case.dtype)
    reference = torch.full((len(targets), size, 4), 0.5, dtype=case.dtype)
    out = denoising(Queries(content, None, reference, [QueryGroup(size, Assignment())]), targets)
    group = out.groups[0]
    if case.meta["dn_meta"] is None:
        case.decide("no denoising queries", group.size == 0 and out.attn_mask is None)
        return
    meta = case.meta["dn_meta"]
    case.decide("groups", group.assignment.normalizer == meta["dn_num"])
    case.decide("size", group.size == meta["dn_num"] * meta["single_padding"])
    case.compare("query_label", out.content[:, : group.size])
    case.compare("query_box_logit", out.reference[:, : group.size].logit())
    case.compare("attn_mask", np.packbits(out.attn_mask.numpy(), axis=1))


def run_labels(case: Case) -> None:
    """Foreground label assignment and its loss, for boxes given in pixels."""
    config = case.config
    for name, layout in case.meta["layouts"].items():
        shapes = tuple(tuple(shape) for shape in layout["level_shapes"])
        boxes = [case.array(f"{name}.boxes{i}") for i in range(len(layout["n_boxes"]))]
        wanted = foreground_targets(boxes, shapes, config["strides"], config["limit_range"])
        case.compare(f"{name}.targets", wanted.to(torch.uint8))
        logits = recipe.normal(f"{case.name}.{name}.logits", (*wanted.shape, 1), case.meta["seed"])
        logits = case.tensor(2 * logits).squeeze(-1).requires_grad_()
        each = torch.stack(
            [
                foreground_loss(x[None], t[None], alpha=config["alpha"], gamma=config["gamma"])
                for x, t in zip(logits, wanted)
            ]
        )
        loss = foreground_loss(logits, wanted, alpha=config["alpha"], gamma=config["gamma"])
        case.compare(f"{name}.loss_per_image", each, floor="loss")
        case.compare(f"{name}.loss", loss, floor="loss")
        (gradient,) = torch.autograd.grad(loss, logits)
        case.compare(f"{name}.grad_rows", gradient[:, ::5], floor="loss")


def run(case: Case) -> None:
    """Replay a whole-model case and compare everything it stores."""
    run_model(case, build_model(case.config))


def run_model(case: Case, model, more: Callable | None = None) -> None:
    """``run`` of ``model``; ``more(case, model, output)`` compares what only such cases store."""
    model.to(case.dtype)
    # Only the last layer predicts in eval mode; cases from before that store all of them.
    training = case.meta["mode"] == "train"
    layers = max(len(case.arrays.get("pred_boxes_all", ())), 1 + len(case.arrays.get("aux_logits_q3", ())))
    model.train(training or layers > 1)
    model.backbone.eval()
    state = convert(case, model)
    denoising = model.transformer.denoising
    queries = []
    if training:
        denoising.draw = recorded_noise(case, denoising)
        denoising.register_forward_hook(lambda _, inputs, output: queries.append(output))
    else:
        model.transformer.denoising = None
        state = {k: v for k, v in state.items() if "denoising" not in k}
    with torch.set_grad_enabled(training):
        Replay(model).run(state, lambda m: _body(case, m, queries, more))


def _body(case: Case, model, queries: list[Queries], more: Callable | None) -> None:
    sizes = [tuple(size) for size in case.meta["image_sizes"]]
    inputs = [{} for _ in sizes]
    targets = None
    if case.meta["mode"] == "train":
        for entry, target in zip(inputs, case.targets()):  # boxes in pixels
            entry["instances"] = Instances(
                target.size, gt_boxes=Boxes(target.boxes), gt_classes=target.labels
            )
        targets = model.targets(inputs)
    if case.meta["start"] == "images":
        for i, entry in enumerate(inputs):
            entry["image"] = case.drawn(f"image{i}")
        output = model.detect(model.preprocess(inputs), targets)
    else:
        features = [case.drawn(name) for name in case.meta["inputs"] if re.fullmatch(r"(res|layer)\d", name)]
        output = model.decode(features, sizes, tuple(case.meta["padded"]), targets)
    compare_tokens(case, output)
    _compare_predictions(case, output)
    if output.encoded.selected is not None:
        _compare_selection(case, output)
    if targets is None:
        _compare_detections(case, model, output, sizes)
    else:
        _compare_denoising(case, output, queries[0])
        _compare_losses(case, model, output, targets)
    if more is not None:
        more(case, model, output)
    case.skip("enc_layer_stats")  # informative: padding, surplus rows


def _compare_predictions(case: Case, output) -> None:
    for image, (memory, padding) in enumerate(zip(output.memory, output.tokens.mask)):
        if case.exact:  # informative: sums of many roundings
            case.compare(f"memory_stats{image}", torch.tensor(stats(memory[~padding])))
        case.skip(f"memory_stats{image}")
    size = output.logits.shape[1]
    case.compare("pred_logits", output.logits)
    case.compare("pred_boxes_all", torch.stack([b[:, -size:] for b in output.decoded.boxes]))
    aux = case.arrays.get("aux_logits_q3", ())
    if len(aux):
        case.compare(
            "aux_logits_q3",
            torch.stack([x[:, -size:][:, : aux.shape[2]] for x in output.decoded.logits[:-1]]),
        )
    case.skip("aux_logits_q3")
    case.compare("enc_boxes", output.proposals.boxes)
    case.compare("enc_logits", output.proposals.logits)
    case.compare("topk_proposals", output.proposals.selected)


def _compare_selection(case: Case, output) -> None:
    """Foreground scores and, as sets, the tokens of every layer and of its object attention."""
    encoded = output.encoded
    case.compare("fg_logit", encoded.scores)
    budgets = encoded.selected_mask.sum(1)
    case.compare("focus_token_nums", budgets)
    for layer, (count, objects) in enumerate(
        zip(encoded.intermediate["layer_counts"], encoded.intermediate["objects"])
    ):
        pairs = {f"fg_inds_l{layer}": encoded.selected[:, :count], f"oesm_inds_l{layer}": objects}
        for name, found in pairs.items():
            if not case.stores(name):
                continue
            wanted = case.tensor(case.arrays[name])
            equal = found.shape == wanted.shape and _same_sets(found, wanted)
            if equal and name.startswith("fg"):  # also what each image keeps for itself
                equal = all(_same_sets(f[:n], w[:n]) for f, w, n in zip(found, wanted, budgets))
            case.decide(name, equal)


def _same_sets(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.sort(-1).values.long(), b.sort(-1).values.long())


def _compare_detections(case: Case, model, output, sizes: list) -> None:
    if case.num_detections:  # boxes that are not clipped, and empty ones too
        scores, labels, boxes = top_detections(output.logits, output.boxes, case.num_detections)
        scale = boxes.new_tensor([[w, h, w, h] for h, w in sizes])
        case.compare("post_scores", scores)
        case.compare("post_labels", labels)
        case.compare("post_boxes", boxes * scale[:, None])
        return
    found = detections(output.logits, output.boxes, sizes, model.max_detections)
    for image, (instances, size) in enumerate(zip(found, case.meta["out_sizes"])):
        result = detector_postprocess(instances, *size)
        case.compare(f"det_boxes{image}", result.pred_boxes.tensor)
        case.compare(f"det_scores{image}", result.scores)
        case.compare(f"det_classes{image}", result.pred_classes)


def _compare_denoising(case: Case, output, queries: Queries) -> None:
    size = queries.groups[0].size
    if not case.meta.get("dn_num"):
        case.decide("no denoising queries", size == 0)
        return
    case.decide("dn_num", queries.groups[0].assignment.normalizer == case.meta["dn_num"])
    case.compare("dn_query_box_logit", queries.reference[:, :size].logit())
    case.compare("dn_query_label_rows", queries.content[:, :size][:, ::EVERY, ::16])
    case.compare("dn_attn_mask", queries.attn_mask.to(torch.uint8))
    case.compare("dn_pred_logits_rows", output.decoded.logits[-1][:, :size][:, ::EVERY])
    case.compare("dn_pred_boxes_rows", output.decoded.boxes[-1][:, :size][:, ::EVERY])


def _compare_losses(case: Case, model, output, targets: list[Target]) -> None:
    criterion = model.criterion
    sets = model.transformer.predictions(output)
    calls = {
        "final"
        if p.assignment.suffix == ""
        else p.assignment.suffix.lstrip("_")
        if p.assignment.suffix == "_enc"
        else f"aux{p.assignment.suffix}": match
        for p, match in zip(sets, criterion.match(sets, targets))
        if p.assignment.matches is None
    }
    start = np.cumsum([0, *(len(t.labels) for t in targets)])
    for call, name in enumerate(case.meta["match_calls"]):
        for image in range(len(targets)):
            mine = calls[name].batch == image
            pairs = torch.stack([calls[name].query[mine], calls[name].target[mine] - start[image]])
            case.decide_rows(f"match{call}_img{image}", pairs.T, transposed=True)

    weights = {name: weight for name, _, weight in criterion.losses(sets, targets)}
    losses = model.losses(output, targets)
    total = sum(losses.values())
    if "loss_foreground" in losses:
        losses["select_loss"] = losses.pop("loss_foreground")
    for name in losses.keys() - weights.keys():  # the encoder's own
        weights[name] = model.transformer.encoder.loss_weight
    names = case.meta["loss_names"]
    case.decide("loss names", sorted(losses) == sorted(names))
    case.compare("losses_weighted", torch.stack([losses[name] for name in names]))
    case.compare("loss_weights", torch.tensor([weights[name] for name in names]))
    case.compare("total_loss", total, case.meta["total_loss"], "losses_weighted")
    compare_gradients(case, total, case.published)


def compare_gradients(case: Case, total: Tensor, published: dict[str, Tensor]) -> None:
    """Gradients with respect to the published parameters (float64 only)."""
    if not case.gradient_arrays():
        return
    names = case.meta["grad_names"]
    frozen = set(case.meta.get("grad_none", ()))
    rows = [i for i, name in enumerate(names) if name not in frozen]
    gradients = torch.autograd.grad(total, [published[names[i]] for i in rows])
    found = [(float(g.norm()), float(g.abs().sum()), float(g.sum())) for g in gradients]
    samples = [g.flatten()[np.linspace(0, g.numel() - 1, 6).round().astype(int)] for g in gradients]
    for name, value in (
        ("grad_stats", torch.tensor(found, dtype=torch.float64)),
        ("grad_samples", torch.stack(samples)),
    ):
        if case.stores(name):
            case.compare(name, value, case.arrays[name][rows])
