"""Replays of Lite DETR: key-aware attention, the interleaved encoder, Lite-DINO as a whole."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from torch import Tensor

from sparse_detr.config import get_config
from sparse_detr.engine.convert import convert_state_dict
from sparse_detr.modeling import KeyAwareDeformAttn, MSDeformAttn
from sparse_detr.modeling.denoising import Noise
from sparse_detr.modeling.matcher import Target
from sparse_detr.modeling.postprocess import top_detections

from . import recipe
from .case import Case, Replay, at, gradients, stats
from .deformable import LOGGED, MEAN, STD, compare_gradients, compare_tokens, convert, images

PREFIX = "transformer.encoder.layers.0.self_attn."


def build_model(config: dict):
    """The model that the configuration of a whole-model or encoder case describes."""
    swin = config.get("backbone", "").startswith("swin")
    name = "swint" if swin else "r50"
    model = get_config(f"lite_detr/lite_dino_{name}_h3l1_2p1x3_36ep").model
    model.num_classes = config.get("num_classes", 91)
    transformer = model.transformer
    transformer.embed_dim = config.get("hidden_dim", config.get("d_model"))
    transformer.num_levels = config["num_feature_levels"]
    transformer.position.temperature = config.get("pe_temperature", config.get("pe_temperatureH"))
    heads = config.get("nheads", config.get("n_heads"))
    points = config.get("enc_n_points", config.get("n_points"))
    encoder = transformer.encoder
    encoder.update(
        num_layers=config["enc_layers"],
        num_blocks=config["num_expansion"],
        num_high_levels=config["enc_scale"],
    )
    encoder.layer.update(ffn_dim=config["dim_feedforward_enc"], dropout=config["dropout"])
    encoder.layer.attention = _attention(config)
    encoder.layer.attention.update(num_heads=heads, num_points=points)
    encoder.layer.low_ffn_dim = config.get("low_level_ffn", transformer.embed_dim)
    if not config["small_expand"]:
        encoder.layer.low_ffn_dim = None
    # The published options reach the encoder only; key awareness reaches the decoder too.
    decoder = transformer.decoder
    decoder.layer.cross_attention = _attention({"key_aware": config["key_aware"]})
    decoder.layer.cross_attention.num_points = config.get("dec_n_points", points)
    decoder.layer.update(num_heads=heads, dropout=config["dropout"])
    if "backbone" in config:
        decoder.num_layers = config["dec_layers"]
        decoder.layer.ffn_dim = config["dim_feedforward_dec"]
        transformer.query_selection.update(
            num_queries=config["num_queries"], learned_content=config["embed_init_tgt"]
        )
        transformer.denoising.update(
            num_classes=config["dn_labelbook_size"],
            num_queries=config["dn_number"],
            box_noise_scale=config["dn_box_noise_scale"],
            label_noise_ratio=config["dn_label_noise_ratio"],
        )
        transformer.heads.share = config["dec_pred_class_embed_share"]
        for loss in ("class", "bbox", "giou"):
            model.criterion.matcher[f"cost_{loss}"] = config[f"set_cost_{loss}"]
        model.criterion.update(
            weight_class=config["cls_loss_coef"],
            weight_bbox=config["bbox_loss_coef"],
            weight_giou=config["giou_loss_coef"],
            alpha=config["focal_alpha"],
        )
    return instantiate(model)


def _attention(config: dict):
    """The config of the encoder's attention, with the options of the published one."""
    lite = get_config("encoders/lite.py")
    attention = lite.attention if config["key_aware"] else lite.plain_attention
    attention.shared_offsets = config.get("same_loc", False)
    if config["key_aware"]:
        attention.key_projection = config.get("proj_key", False)
    return attention


# Attention ---------------------------------------------------------------------------------------


def run_attention(case: Case) -> None:
    """The attention module: its output and the gradients of all inputs and parameters."""
    config = case.config
    sizes = dict(
        embed_dim=config["d_model"],
        num_heads=config["n_heads"],
        num_levels=config["n_levels"],
        num_points=config["n_points"],
        shared_offsets=config["same_loc"],
    )
    if config["key_aware"]:
        layer = KeyAwareDeformAttn(**sizes, key_projection=config["proj_key"])
    else:
        layer = MSDeformAttn(**sizes)
    unused = case.meta.get("unused_parameters", [])
    state = {name.removeprefix(PREFIX): value for name, value in case.state_dict().items()}
    layer.to(case.dtype).load_state_dict({k: v for k, v in state.items() if k not in unused})

    reference = torch.cat(
        [case.drawn("reference", n) for n in range(config["reference_dim"] // 2)], dim=-1
    ).requires_grad_()
    query, value = (case.drawn(name).requires_grad_() for name in ("query", "value"))
    shapes = tuple(tuple(shape) for shape in config["spatial_shapes"])
    mask = case.array("mask") if "mask" in case.arrays else None
    output, _ = layer(query, reference, value, shapes, mask)
    steps = case.meta.get("steps", {})
    case.compare("output", output[:, :: steps.get("out_step", 1)])

    upstream = case.drawn_like("grad_output", output)
    inputs = {"query": query, "reference": reference, "value": value}
    found = gradients((output * upstream).sum(), inputs | dict(layer.named_parameters()))
    case.compare("grad_query", found["query"][:, :: steps.get("q_step", 1)])
    case.compare("grad_reference", found["reference"])
    case.compare("grad_value_rows", found["value"][:, :: steps.get("v_step", 1)])
    for name in ("query", "value"):
        case.compare(f"grad_{name}_stats", torch.tensor(stats(found[name])))
    for name, _ in layer.named_parameters():
        case.compare(f"grad:{name}", _every_row(found[name]))
        case.compare(f"gradstat:{name}", torch.tensor(stats(found[name])))


def _every_row(gradient: Tensor) -> Tensor:
    """Matrices are stored in 16 rows."""
    return gradient[:: max(1, len(gradient) // 16)] if gradient.dim() > 1 else gradient


# Encoder -----------------------------------------------------------------------------------------


def run_encoder(case: Case) -> None:
    """The encoder from projected maps on: memory, every layer, gradients of maps and parameters."""
    model = build_model(case.config).to(case.dtype).train()
    case.published = case.state_dict()
    state, report = convert_state_dict(case.published, model)
    # The case has no parameters of anything behind the encoder.
    encoder = ("transformer.encoder.", "transformer.level_embed")
    missing = [name for name in report.missing if name.startswith(encoder)]
    if missing or report.unexpected:
        raise ValueError(f"{case.name}: conversion leaves {missing=} unexpected={report.unexpected}")
    Replay(model).run(state, lambda m: _encoder_body(case, m.transformer))


def _encoder_body(case: Case, transformer) -> None:
    shapes = [tuple(shape) for shape in case.meta["spatial_shapes"]]
    maps = [case.drawn(f"src{level}").requires_grad_() for level in range(len(shapes))]
    mask = torch.ones(len(case.meta["image_sizes"]), *case.meta["padded_size"], dtype=case.dtype)
    for image, (height, width) in zip(mask, case.meta["image_sizes"]):
        image[:height, :width] = 0
    masks = [F.interpolate(mask[None], size=shape)[0].bool() for shape in shapes]
    tokens = transformer.tokenize(maps, masks)
    case.compare("mask", tokens.mask)

    encoder, layers = transformer.encoder, []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: layers.append(output))
        for layer in encoder.layers
    ]
    memory = encoder(tokens).memory
    for hook in hooks:
        hook.remove()

    case.compare_rows("memory_rows", memory)
    case.compare("memory_c8", memory.masked_fill(tokens.mask[..., None], 0)[..., :8])
    case.compare_stats("memory_stats", memory, tokens.mask)
    case.compare_rows("pos_rows", tokens.position)
    start = case.meta["high_level_start"]
    schedule = ["global" if encoder.is_global(i) else "high" for i in range(len(layers))]
    case.decide("layer_schedule", schedule == case.meta["layer_schedule"])
    case.decide(
        "high_level_start",
        all(x.shape[1] == memory.shape[1] - start * (kind == "high") for x, kind in zip(layers, schedule)),
    )
    if case.stores("layer_rows"):
        rows = case.array("rows")
        # What a high-level step leaves alone is stored as zero.
        layers = [F.pad(x, (0, 0, memory.shape[1] - x.shape[1], 0)) for x in layers]
        case.compare("layer_rows", torch.stack([at(x, rows)[..., :32] for x in layers]))

    stored = case.gradient_arrays()
    if not stored:
        return
    upstream = case.drawn("grad_output").masked_fill(tokens.mask[..., None], 0)
    found = gradients((memory * upstream).sum(), {**dict(enumerate(maps)), **case.published})
    for level in range(len(maps)):
        case.compare(f"grad_src{level}_c4", found[level][:, :4])
        case.compare(f"gradstat_src{level}", torch.tensor(stats(found.pop(level))))
    names = case.meta["grad_names"]
    case.compare("grad_norm", torch.stack([found[name].norm() for name in names]))
    case.compare("grad_sum", torch.stack([found[name].sum() for name in names]))
    for key in stored:
        if key.startswith("grad:"):  # names without their prefix
            name = next(n for n in found if n.endswith(f".{key.removeprefix('grad:')}"))
            case.compare(key, _every_row(found[name]))


# Whole models ------------------------------------------------------------------------------------


def run(case: Case) -> None:
    """Lite-DINO: what it predicts without denoising, then a training step with it."""
    model = build_model(case.config).to(case.dtype)
    model.train()  # all decoder layers predict; dropout is 0
    model.backbone.eval()
    state = convert(case, model)
    denoising = model.transformer.denoising
    model.transformer.denoising = None
    detect = {name: value for name, value in state.items() if "denoising" not in name}
    with torch.no_grad():
        Replay(model).run(detect, lambda m: _detection_body(case, m))
    if "denoising" in case.meta or case.stores("loss_values"):
        model.transformer.denoising = denoising
        denoising.draw = _recorded_noise(case)
        queries = []
        denoising.register_forward_hook(lambda _, inputs, output: queries.append(output))
        Replay(model).run(state, lambda m: _training_body(case, m, queries))


def _recorded_noise(case: Case):
    """A ``draw`` that returns the case's random numbers; without objects there are none."""
    count = (case.meta.get("denoising") or {}).get("K", 0)

    def draw(rows: int, like: Tensor) -> Noise:
        if rows != count:
            raise ValueError(f"{case.name}: {rows} denoising queries, the case has {count}")

        def uniform(name: str, *shape: int) -> Tensor:
            return case.tensor(
                recipe.uniform(f"{case.name}.dn.{name}", (rows, *shape), seed=case.meta["seed"])
            )

        labels = (uniform("new_label") * case.config["dn_labelbook_size"]).floor().long()
        sign = torch.where(uniform("sign", 4) >= 0.5, 1, -1)
        return Noise(uniform("label_p"), labels, sign, uniform("part", 4))

    return draw


def _compare_strided(case: Case, name: str, x: Tensor) -> None:
    """``compare`` of every n-th query, as the case says; queries are next to last."""
    for names, how in case.meta.get("slicing", {}).items():
        if name in names.split(", "):
            x = x[..., :: int(re.search(r"::(\d+)", how)[1]), :]
    case.compare(name, x)


def _detection_body(case: Case, model) -> None:
    if not case.exact and case.meta.get("min_decision_ratio", 1) < 1:
        # The ranking is closer than float32 resolves: take it as given.
        selected = case.array("topk_proposals").long()
        model.transformer.query_selection.select = lambda scores, invalid: selected
    output = model.detect(images(case, MEAN, STD))
    tokens, decoded, proposals = output.tokens, output.decoded, output.proposals
    compare_tokens(case, output)
    head = model.transformer.proposal_head
    scores = head.class_head(head.project(output.encoded.memory, tokens.unproposed))  # (B, N, num_classes)
    case.compare_rows("enc_logits_rows", scores)
    case.compare("enc_score", head.score(scores).masked_fill(tokens.mask, 0))
    case.compare("topk_proposals", proposals.selected)
    case.compare("init_reference", decoded.references[0])
    case.compare("interm_boxes", proposals.boxes)
    for name, value in {
        "interm_logits": proposals.logits,
        "pred_logits": output.logits,
        "pred_boxes": output.boxes,
        "hs_last": decoded.states[-1],
    }.items():
        _compare_strided(case, name, value)
    if len(decoded.boxes) > 1:
        _compare_strided(case, "aux_boxes", torch.stack(decoded.boxes[:-1]))
        _compare_strided(case, "aux_logits", torch.stack(decoded.logits[:-1]))
    if case.num_detections:
        scores, labels, boxes = top_detections(output.logits, output.boxes, case.num_detections)
        scale = boxes.new_tensor([[w, h, w, h] for h, w in case.meta["target_sizes"]])
        case.compare("post_scores", scores)
        if case.exact:  # the order of the detections is not protected
            case.compare("post_labels", labels)
            case.compare("post_boxes", boxes * scale[:, None])
    case.skip("post_labels", "post_boxes")
    if any(name.startswith("eval_") for name in case.arrays):
        _compare_losses(case, model, output, case.targets(), "eval_")


def _training_body(case: Case, model, queries: list) -> None:
    targets = case.targets()
    output = model.detect(images(case, MEAN, STD), targets)
    group, size = queries[0].groups[0], queries[0].groups[0].size
    # Without objects there are no denoising queries, and the published code counts one group.
    meta = case.meta.get("dn_meta") or {"pad_size": 0, "num_dn_group": 1}
    case.decide("dn_meta", [size, group.assignment.normalizer] == [meta["pad_size"], meta["num_dn_group"]])
    case.compare("dn_input_boxes", queries[0].reference[:, :size])
    case.compare("dn_input_content", queries[0].content[:, :size, :4])
    if case.stores("dn_boxes"):
        case.compare("dn_boxes", output.decoded.boxes[-1][:, case.array("dn_pos").long()])
    _compare_strided(case, "dn_logits", output.decoded.logits[-1][:, :size])
    case.compare("train_pred_boxes", output.boxes)
    compare_gradients(case, _compare_losses(case, model, output, targets, ""))


def _compare_losses(case: Case, model, output, targets: list[Target], prefix: str) -> Tensor:
    """Matches and losses under their published names; returns the weighted total."""
    criterion = model.criterion
    sets = model.transformer.predictions(output)
    calls = {"_enc": "interm", "": "final"}
    start = torch.tensor([0, *(len(t.labels) for t in targets)]).cumsum(0)
    found = []
    for prediction, match in zip(sets, criterion.match(sets, targets)):
        if prediction.assignment.matches is None:
            call = calls.get(prediction.assignment.suffix, f"aux{prediction.assignment.suffix}")
            number = torch.full_like(match.query, case.meta["match_calls"].index(call))
            local = match.target - start[match.batch]
            found.append(torch.stack([number, match.batch, match.query, local], 1))
    case.decide_rows(f"{prefix}matches", torch.cat(found))

    raw = {
        name.replace("loss_class", "loss_ce").replace("_enc", "_interm"): (value, weight)
        for name, value, weight in criterion.losses(sets, targets)
    }
    total = sum(value * weight for value, weight in raw.values())
    if case.stores(f"{prefix}loss_values"):
        for name, wanted in case.named(f"{prefix}loss_values", case.meta[f"{prefix}losses"]):
            if name.startswith((*LOGGED, "loss_xy", "loss_hw")):
                continue
            # Where there is no denoising, the published criterion fills in zeros.
            value, weight = raw.pop(name, (None, None))
            case.compare_loss(name, value, wanted, prefix)
            if value is not None:
                case.decide(f"{prefix}weight:{name}", weight == case.meta["weight_dict"][name])
        # ... or leaves its losses out, which are zero here.
        left = [name for name, (value, _) in raw.items() if "_dn" not in name or float(value) != 0]
        assert not left, f"{case.name}: losses {left} are not in the published model"
    case.compare(f"{prefix}total_loss", total.reshape(1))
    return total
