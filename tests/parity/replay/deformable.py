"""Replays of Deformable DETR, Sparse DETR and H-DETR: whole models, from images or feature maps."""

from __future__ import annotations

import copy
import re

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.structures import ImageList
from torch import Tensor

from sparse_detr.config import get_config
from sparse_detr.engine.convert import convert_state_dict
from sparse_detr.modeling import build_dilated_resnet
from sparse_detr.modeling.matcher import Target
from sparse_detr.modeling.postprocess import top_detections

from .case import Case, Replay, at, gradients

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Logged by the published code, not part of the function.
LOGGED = ("class_error", "cardinality_error")


def build_model(config: dict, num_classes: int, backbone_channels: list[int] | None = None):
    """The model that the published command line ``config`` describes."""
    two_stage, refine = config["two_stage"], config["with_box_refine"]
    mixed = config.get("mixed_selection", False)  # H-DETR
    name = "hdetr" if mixed else "deformable_detr_two_stage" if two_stage else "deformable_detr"
    model = get_config(f"models/{name}.py").model
    model.num_classes = num_classes
    transformer = model.transformer
    transformer.embed_dim = config["hidden_dim"]
    transformer.num_levels = levels = config["num_feature_levels"]
    for layer, attention, points in (
        (transformer.encoder.layer, "attention", "enc_n_points"),
        (transformer.decoder.layer, "cross_attention", "dec_n_points"),
    ):
        layer.ffn_dim = config["dim_feedforward"]
        layer.dropout = config["dropout"]
        layer[attention].num_heads = config["nheads"]
        layer[attention].num_points = config[points]
    transformer.decoder.layer.num_heads = config["nheads"]
    transformer.encoder.num_layers = config["enc_layers"]
    transformer.decoder.num_layers = config["dec_layers"]
    transformer.decoder.refine = refine or two_stage
    transformer.heads.share = not refine
    if mixed:
        transformer.decoder.look_forward_twice = config["look_forward_twice"]
        transformer.query_selection.update(
            num_queries=config["num_queries_one2one"],
            num_one_to_many=config["num_queries_one2many"],
            repeat=config["k_one2many"],
            weight=config["lambda_one2many"],
        )
    else:
        transformer.query_selection.num_queries = config["num_queries"]
    if two_stage and not mixed:
        transformer.share_proposal_heads = not refine
        transformer.query_selection.content_from_memory = config["eff_query_init"]
        transformer.proposal_head.class_agnostic = not config["eff_specific_head"]
    if config.get("rho") or config.get("use_enc_aux_loss"):
        sparse = get_config("encoders/sparse.py").encoder
        sparse.layer = copy.deepcopy(transformer.encoder.layer)
        sparse.num_layers = config["enc_layers"]
        sparse.keep_ratio = config["rho"] or None
        sparse.auxiliary_heads = config["use_enc_aux_loss"]
        sparse.loss_weight = config["mask_prediction_coef"]
        transformer.encoder = sparse
    criterion = model.criterion
    criterion.weight_class = config["cls_loss_coef"]
    criterion.weight_bbox = config["bbox_loss_coef"]
    criterion.weight_giou = config["giou_loss_coef"]
    criterion.alpha = config["focal_alpha"]
    for cost in ("class", "bbox", "giou"):
        criterion.matcher[f"cost_{cost}"] = config[f"set_cost_{cost}"]
    _set_backbone(model, config, levels)
    return instantiate(model)


def _set_backbone(model, config: dict, levels: int) -> None:
    kind = config["backbone"]
    if kind.startswith("swin"):
        backbones = get_config("models/backbones.py")
        source = backbones.swin_tiny
        model.backbone, model.in_features = source.backbone, source.in_features
        model.neck.in_channels = source.in_channels
    else:
        depth = int(kind.removeprefix("resnet"))
        model.backbone.stages.depth = depth
        if config.get("dilation"):
            model.backbone = L(build_dilated_resnet)(depth=depth, out_features=list(model.in_features))
    if levels == 1:  # the published single-scale models see the last map only
        model.in_features = model.in_features[-1:]
        model.neck.in_channels = model.neck.in_channels[-1:]


def convert(case: Case, model) -> dict[str, Tensor]:
    """The case's published parameters under this project's names; nothing may be left over."""
    published = {
        name: value
        for name, value in case.state_dict().items()
        if not name.endswith("relative_position_index")  # computed by the model, not learned
    }
    case.published = published
    converted, report = convert_state_dict(published, model)
    report.missing = [
        name
        for name in report.missing
        if not name.endswith("relative_position_index")
        and not (
            case.meta.get("from_", case.meta.get("start", "image")) not in ("image", "images")
            and name.startswith("backbone.")
        )
    ]
    if not report.complete:
        raise ValueError(
            f"{case.name}: conversion leaves missing={report.missing[:5]} unexpected={report.unexpected[:5]}"
        )
    return converted


def run(case: Case) -> None:
    """Replay a whole-model case and compare everything it stores."""
    model = build_model(case.config, case.meta["num_classes"]).to(case.dtype)
    # Most cases ran in training mode, where every layer predicts; "eval" is what it says.
    training = case.meta["mode"] != "eval"
    model.train(training)
    model.backbone.eval()  # no stochastic depth; the norms are frozen
    with torch.set_grad_enabled(training):
        Replay(model).run(convert(case, model), lambda m: _body(case, m))


def _body(case: Case, model) -> None:
    sizes = [tuple(size) for size in case.meta["image_sizes"]]
    targets = case.targets() if model.training else None
    if case.meta["from_"] == "image":
        output = model.detect(images(case, MEAN, STD), targets)
    else:
        features = [case.drawn(name) for name in case.meta["inputs"] if name.startswith("feat")]
        padded = tuple(max(size[i] for size in sizes) for i in (0, 1))
        output = model.decode(features, sizes, padded, targets)
    compare_tokens(case, output)
    _compare_predictions(case, model, output)
    if targets is not None:
        _compare_losses(case, model, output, targets)


def images(case: Case, mean, std) -> ImageList:
    """The case's images, normalised and then zero-padded."""
    normalised = []
    for name in case.meta["inputs"]:
        if name.startswith("image") and name[5:].isdigit():
            image = case.drawn(name) / 255
            normalised.append(
                (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]
            )
    return ImageList.from_tensors(normalised)


def compare_tokens(case: Case, output) -> None:
    """The parts that all whole-model cases store: geometry, encoder input and output."""
    tokens = output.tokens
    case.compare("spatial_shapes", torch.tensor(tokens.shapes))
    case.compare("valid_ratios", tokens.valid_ratios)
    case.compare_rows("src_rows", tokens.features)
    case.compare_rows("memory_rows", output.memory)
    if case.stores("lvl_pos_rows"):  # of the first rows only
        rows = case.array("rows")[:, : case.arrays["lvl_pos_rows"].shape[1]]
        case.compare("lvl_pos_rows", at(tokens.position, rows))
    if case.stores("memory_stats"):
        case.compare_stats("memory_stats", output.memory, tokens.mask)


def _compare_predictions(case: Case, model, output) -> None:
    decoded = output.decoded
    case.compare("pred_logits", output.logits)
    case.compare("pred_boxes", output.boxes)
    case.compare("hs_last", decoded.states[-1][:, ::6])
    case.compare("init_reference", decoded.references[0])
    if len(decoded.boxes) > 1:
        case.compare("aux_boxes", torch.stack(decoded.boxes[:-1]))
        case.compare("aux_logits_q6", torch.stack(decoded.logits[:-1])[:, :, ::6])
    if len(output.groups) > 1:
        second = slice(output.groups[0].size, None)
        case.compare("one2many_boxes", decoded.boxes[-1][:, second])
        case.compare("one2many_logits_q6", decoded.logits[-1][:, second][:, ::6])
    if output.proposals is not None:
        # The model boxes only the tokens that it selects; published code boxes all.
        head = model.transformer.proposal_head
        projected = head.project(output.encoded.memory, output.tokens.unproposed)
        logits = head.class_head(projected)
        case.compare_rows("enc_logits_rows", logits)
        case.compare_rows("enc_boxes_rows", head.refine(projected, output.tokens.proposals).sigmoid())
        case.compare("enc_fg_score", head.score(logits))
        case.compare("topk_proposals", output.proposals.selected)
    if output.encoded.selected is not None:
        case.compare("mask_prediction", output.encoded.scores)
        case.compare("backbone_topk_proposals", output.encoded.selected)
        case.compare("sparse_token_nums", output.encoded.selected_mask.sum(1))
        case.compare("valid_token_nums", (~output.tokens.mask).sum(1))
    if output.encoded.predictions:
        _compare_encoder_predictions(case, output.encoded)
    if case.num_detections:
        _compare_detections(case, output)


def _compare_encoder_predictions(case: Case, encoded) -> None:
    """The encoder's auxiliary predictions at ``aux_enc_pos``, places in the list of chosen tokens.

    A dense encoder's list is all tokens: places and ``aux_enc_token`` are the same.
    """
    if case.stores("aux_enc_pos"):
        rows = case.array("aux_enc_pos").long().expand(len(encoded.memory), -1)
    elif case.stores("aux_enc_token") and encoded.selected is None:
        rows = case.array("aux_enc_token")
    else:
        return
    if encoded.selected is not None:
        case.compare("aux_enc_token", encoded.selected.gather(1, rows))
        rows = encoded.kept.order.argsort(1).gather(1, rows)
    logits, boxes = zip(*encoded.predictions.values())
    case.compare("aux_enc_logits", torch.stack([at(x, rows) for x in logits]))
    case.compare("aux_enc_boxes", torch.stack([at(x, rows) for x in boxes]))


def _compare_detections(case: Case, output) -> None:
    k = case.num_detections
    scores, labels, boxes = top_detections(output.logits, output.boxes, k)
    sizes = [[float(x) for x in pair.split(",")] for pair in _pairs(case)]
    scale = boxes.new_tensor([[w, h, w, h] for h, w in sizes])
    case.compare("post_scores", scores)
    case.compare("post_labels", labels)
    case.compare("post_boxes", boxes * scale[:, None])
    pairs = output.logits.sigmoid().flatten(1).topk(k, dim=1).indices
    case.compare("post_query", pairs // output.logits.shape[-1])


def _pairs(case: Case) -> list[str]:
    text = case.meta["inputs"]["target_sizes"].split(":", 1)[1]
    return [pair.strip("[] ") for pair in text.split("], [")]


def _compare_losses(case: Case, model, output, targets: list[Target]) -> None:
    criterion = model.criterion
    # Published code computes the second group's losses last; one object is as good as its repeats.
    sets = sorted(model.transformer.predictions(output), key=lambda s: s.assignment.repeat > 1)
    counts = torch.tensor([len(t.labels) for t in targets])
    calls = []
    for call, (one, match) in enumerate(zip(sets, criterion.match(sets, targets))):
        start = (counts * one.assignment.repeat).cumsum(0) - counts * one.assignment.repeat
        local, query = (match.target - start[match.batch]) % counts[match.batch], match.query
        if one.assignment.suffix.startswith("_enc_") and output.encoded.selected is not None:
            query = output.encoded.kept.order[match.batch, query]  # its rank
        calls.append(torch.stack([torch.full_like(local, call), match.batch, query, local], 1))
    case.decide_rows("matches", torch.cat(calls))

    raw, total = {}, 0.0
    for name, value, weight in criterion.losses(sets, targets):
        total = total + value * weight
        if "_one2many" in name:  # published: in other order, and already times its branch's weight
            name = re.sub(r"(_one2many)(_\d+)", r"\2\1", name)
            value = value * case.config["lambda_one2many"]
        raw[name.replace("loss_class", "loss_ce")] = value
    encoder = model.transformer.encoder
    for name, value in encoder.losses(output.encoded, output.decoded, output.tokens, targets).items():
        total = total + value
        raw[name] = value / case.config["mask_prediction_coef"]
    for name, value in output.encoded.metrics.items():
        raw[name] = value
    if case.stores("loss_values"):
        for name, wanted in case.named("loss_values", case.meta["loss_names"]):
            if not name.startswith(LOGGED):
                case.compare_loss(name, raw.pop(name, None), wanted)
        assert not raw, f"{case.name}: losses {list(raw)} are not in the published model"
    case.compare("total_loss", total.reshape(1))
    if output.encoded.selected is not None:
        case.compare("dam_map", output.encoded.intermediate["attention_map"])
        case.compare("dam_target", output.encoded.intermediate["target"])
    compare_gradients(case, total)


def compare_gradients(case: Case, total: Tensor) -> None:
    """Gradients of ``total`` with respect to the published parameters (float64 only)."""
    stored = case.gradient_arrays()
    if not stored:
        return
    found = gradients(total, {name: case.published[name] for name in case.meta["grad_names"]})
    case.compare("grad_norm", torch.stack([g.norm() for g in found.values()]))
    case.compare("grad_sum", torch.stack([g.sum() for g in found.values()]))
    for key in stored:
        if key.startswith("grad:"):
            gradient, shape = found[key.removeprefix("grad:")], case.arrays[key].shape
            if gradient.dim() > 1:  # the first rows and columns of the flattened filters are stored
                gradient = gradient.flatten(1)[:, : shape[1]]
            case.compare(key, gradient[: shape[0]])
