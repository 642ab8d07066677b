"""Computes the cases of RT-DETR with Hugging Face's transformers: ``python -m tests.parity.make_rt_detr``.

transformers' ``RTDetrForObjectDetection`` runs as it is installed (it is no requirement of this project), in
float64 and once more in float32 for the noise floors. Weights are drawn under the names that they have in
its files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig
from transformers.loss import loss_rt_detr
from transformers.models.rt_detr import modeling_rt_detr

from .replay import recipe
from .replay.case import stats

FOLDER = Path(__file__).parent / "cases" / "rt_detr"
NORM = "model.encoder.fpn_blocks.0.conv1.norm"  # whose statistics a training case stores
EVERY = 7  # denoising queries are stored in steps of this
# Names in the memory of transformers 5 -> those in its files.
IN_FILES = (
    (r"\.aifi\.", ".encoder."),
    (r"(\.layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    (r"\.o_proj\.", ".out_proj."),
)
CASES = {
    "rt_detr_r18_eval": dict(depth=18, mode="eval", size=(160, 224), num_queries=40, layers=3, classes=80),
    "rt_detr_r50_train": dict(depth=50, mode="train", size=(192, 160), num_queries=24, layers=3, classes=12),
}


def file_name(name: str) -> str:
    for pattern, replacement in IN_FILES:
        name = re.sub(pattern, replacement, name)
    return name


def build(depth: int, layers: int, num_queries: int, classes: int, num_denoising: int = 50):
    bottleneck = depth >= 50
    widths = [256, 512, 1024, 2048] if bottleneck else [64, 128, 256, 512]
    backbone = RTDetrResNetConfig(
        layer_type="bottleneck" if bottleneck else "basic",
        depths=[3, 4, 6, 3] if bottleneck else [2, 2, 2, 2],
        hidden_sizes=widths,
        out_indices=[2, 3, 4],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=widths[1:],
        hidden_expansion=1.0 if bottleneck else 0.5,
        decoder_layers=layers,
        num_queries=num_queries,
        num_labels=classes,
        num_denoising=num_denoising,
        attn_implementation="eager",
    )
    return RTDetrForObjectDetection(config), config


class Draws:
    """torch's random functions, drawn by name instead; denoising calls them in this order."""

    names = iter(())

    def __init__(self, case: str, seed: int):
        self.case, self.seed, self.found = case, seed, {}
        self.names = iter(("label_p", "label_new", "box_sign", "box_rand"))

    def uniform(self, like: Tensor) -> np.ndarray:
        name = next(self.names)
        self.found[name] = recipe.uniform(f"{self.case}.dn.{name}", like.shape, 0, 1, self.seed)
        return self.found[name]

    def rand_like(self, like: Tensor, dtype=None) -> Tensor:
        return torch.from_numpy(self.uniform(like)).to(dtype or like.dtype)

    def randint_like(self, like: Tensor, low: int, high: int, dtype=None) -> Tensor:
        drawn = np.floor(low + self.uniform(like) * (high - low))
        self.found[next(reversed(self.found))] = drawn
        return torch.from_numpy(drawn).to(dtype or like.dtype)


class TorchWithDraws:
    """The module torch, but for its random functions."""

    def __init__(self, draws: Draws):
        self.rand_like, self.randint_like = draws.rand_like, draws.randint_like

    def __getattr__(self, name: str):
        return getattr(torch, name)


def run(name: str, seed: int, dtype: torch.dtype, depth, mode, size, num_queries, layers, classes) -> tuple:
    """(arrays, what of the JSON file is known only now, all in ``dtype``)."""
    torch.set_default_dtype(dtype)
    model, config = build(depth, layers, num_queries, classes)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(
        {key: torch.from_numpy(recipe.fill(file_name(key), shape, seed)) for key, shape in shapes.items()}
    )
    model.train(mode == "train")
    model.model.backbone.eval()
    images = [recipe.uniform(f"{name}.image{i}", (3, *size), 0, 255, seed) for i in range(2)]
    pixels = torch.stack([torch.from_numpy(image) for image in images]).to(dtype) / 255
    labels, arrays = None, {}
    if mode == "train":
        labels = []
        for i in range(2):
            count = 3
            corner = recipe.uniform(f"{name}.corner{i}", (count, 2), 0.02, 0.5, seed)
            side = recipe.uniform(f"{name}.side{i}", (count, 2), 0.1, 0.45, seed)
            scale = np.array([size[1], size[0]] * 2, np.float32)
            boxes = np.concatenate([corner, corner + side], 1) * scale
            classes_of = np.floor(recipe.uniform(f"{name}.label{i}", (count,), 0, classes, seed)).astype(int)
            arrays[f"target_boxes{i}"], arrays[f"target_labels{i}"] = boxes, classes_of
            xyxy = torch.from_numpy(boxes).to(dtype) / torch.from_numpy(scale).to(dtype)
            cxcywh = torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], 1)
            labels.append({"class_labels": torch.from_numpy(classes_of), "boxes": cxcywh})

    kept: dict = {"matches": []}
    handles = [
        model.model.encoder.register_forward_pre_hook(
            lambda _, args, kwargs: kept.update(source=list(args[0])), with_kwargs=True
        ),
        model.model.decoder.register_forward_pre_hook(
            lambda _, args, kwargs: kept.update(decoder=kwargs), with_kwargs=True
        ),
        model.model.enc_score_head.register_forward_hook(lambda _, args, out: kept.update(scores=out)),
    ]
    matcher = loss_rt_detr.RTDetrHungarianMatcher.forward

    def match(self, outputs, targets):
        kept["matches"].append(matcher(self, outputs, targets))
        return kept["matches"][-1]

    draws = Draws(name, seed)
    loss_rt_detr.RTDetrHungarianMatcher.forward = match
    modeling_rt_detr.torch = TorchWithDraws(draws)
    try:
        with torch.set_grad_enabled(mode == "train"):
            output = model(pixels, labels=labels)
    finally:
        loss_rt_detr.RTDetrHungarianMatcher.forward = matcher
        modeling_rt_detr.torch = torch
        for handle in handles:
            handle.remove()

    decoder = kept["decoder"]
    meta = {"shapes": {file_name(key): shape for key, shape in shapes.items()}}
    memory = decoder["encoder_hidden_states"]
    rows = np.stack([np.linspace(0, memory.shape[1] - 1, 24).round().astype(int)] * 2)
    source = torch.cat([x.flatten(2).mT for x in kept["source"]], 1)
    split = decoder["inputs_embeds"].shape[1] - num_queries
    arrays |= {
        "spatial_shapes": np.array(decoder["spatial_shapes_list"]),
        "rows": rows,
        "src_rows": source[:, rows[0]],
        "memory_rows": memory[:, rows[0]],
        "pred_logits": output.logits[:, split:],
        "pred_boxes_all": output.intermediate_reference_points.transpose(0, 1)[:, :, split:],
        "enc_logits": output.enc_topk_logits,
        "enc_boxes": output.enc_topk_bboxes,
        "topk_proposals": kept["scores"].amax(-1).topk(num_queries, dim=1).indices,
    }
    arrays |= {f"memory_stats{i}": np.array(stats(image)) for i, image in enumerate(memory)}
    scores = kept["scores"].amax(-1).sort(1, descending=True).values[:, : num_queries + 1]
    meta["selection_margin"] = float((scores[:, :-1] - scores[:, 1:]).min())
    if mode == "eval":
        arrays["pred_boxes_all"] = arrays["pred_boxes_all"][-1:]
        found = RTDetrImageProcessor().post_process_object_detection(
            output, threshold=-1.0, target_sizes=[size, size]
        )
        for key in ("scores", "labels", "boxes"):
            arrays[f"post_{key}"] = torch.stack([entry[key] for entry in found])
        return arrays, meta

    arrays["aux_logits_q3"] = output.intermediate_logits.transpose(0, 1)[:-1, :, split : split + 3]
    arrays |= {
        "dn_query_box_logit": decoder["reference_points"][:, :split],
        "dn_query_label_rows": decoder["inputs_embeds"][:, :split][:, ::EVERY, ::16],
        "dn_attn_mask": torch.isinf(decoder["encoder_attention_mask"]).to(torch.uint8),
        "dn_pred_logits_rows": output.intermediate_logits[:, -1, :split][:, ::EVERY],
        "dn_pred_boxes_rows": output.intermediate_reference_points[:, -1, :split][:, ::EVERY],
    }
    copies = split // 3  # objects of an image follow each other; here, a copy holds those of all images
    for key, drawn in draws.found.items():
        rest = drawn.shape[2:]
        arrays[f"dn_{key}"] = drawn.reshape(2, copies, 3, *rest).swapaxes(0, 1).reshape(-1, *rest)
    for call, pairs in enumerate(kept["matches"]):
        for image, (query, target) in enumerate(pairs):
            arrays[f"match{call}_img{image}"] = torch.stack([query, target])
    names = {}
    last = layers - 1
    for theirs in output.loss_dict:
        kind, _, rest = theirs.removeprefix("loss_").partition("_")
        ours = {"vfl": "loss_class"}.get(kind, f"loss_{kind}")
        index = int(rest.rpartition("_")[2]) if rest else None
        if rest.startswith("aux"):
            ours += "_enc" if index == last else f"_{index}"
        elif rest.startswith("dn"):
            ours += "_dn" if index == last else f"_dn_{index}"
        names[theirs] = ours
    weight = {"vfl": 1.0, "bbox": 5.0, "giou": 2.0}
    arrays["losses_weighted"] = torch.stack([output.loss_dict[key] for key in names])
    arrays["loss_weights"] = np.array([weight[key.split("_")[1]] for key in names])
    norm = model.get_submodule(NORM)
    arrays["bn_running_mean"], arrays["bn_running_var"] = norm.running_mean, norm.running_var
    leaves = {file_name(key): value for key, value in model.named_parameters()}
    gradients = dict(zip(leaves, torch.autograd.grad(output.loss, list(leaves.values()))))
    arrays["grad_stats"] = np.array(
        [[float(g.norm()), float(g.abs().sum()), float(g.sum())] for g in gradients.values()]
    )
    arrays["grad_samples"] = np.stack(
        [
            g.flatten()[np.linspace(0, g.numel() - 1, 6).round().astype(int)].detach().numpy()
            for g in gradients.values()
        ]
    )
    meta |= {
        "total_loss": float(output.loss.detach()),
        "loss_names": list(names.values()),
        "match_calls": ["final", *(f"aux_{i}" for i in range(last)), "enc"],
        "grad_names": list(gradients),
        "dn_num": split // 6,
        "single_padding": 6,
    }
    return arrays, meta


def to_numpy(value) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)


def make(name: str, seed: int, **options) -> None:
    arrays, meta = run(name, seed, torch.float64, **options)
    arrays = {key: to_numpy(value) for key, value in arrays.items()}
    rough, _ = run(name, seed, torch.float32, **options)
    floors = {
        key: float(np.abs(to_numpy(rough[key]).astype(float) - value).max())
        for key, value in arrays.items()
        if value.dtype.kind == "f" and not key.startswith(("target", "rows", "grad_stats"))
    }
    if "dn_query_box_logit" in arrays:  # here they take the way through a float32 sigmoid
        logits = torch.from_numpy(arrays["dn_query_box_logit"])
        floors["dn_query_box_logit"] = float((logits.float().sigmoid().logit() - logits).abs().max())
    height, width = options["size"]
    shapes, margin = meta.pop("shapes"), meta.pop("selection_margin")
    case = {
        "case": name,
        "system": "rt_detr",
        "source": f"transformers {transformers.__version__} RTDetrForObjectDetection, "
        "attn_implementation='eager', CPU; made by tests/parity/make_rt_detr.py",
        "config": {
            "system": "rt_detr",
            "backbone": f"ResNet-{options['depth']}-D, FrozenBN",
            "expansion": 1.0 if options["depth"] >= 50 else 0.5,
            "dec_layers": options["layers"],
            "num_queries": options["num_queries"],
            "num_classes": options["classes"],
            "dn_number": 50,
            "label_noise_ratio": 0.5,
            "box_noise_scale": 1.0,
            "look_forward_twice": False,
        },
        "mode": options["mode"],
        "image_sizes": [[height, width]] * 2,
        "padded": [height, width],
        "start": "images",
        "seed": seed,
        "inputs": {
            f"image{i}": f"uniform('{name}.image{i}', (3,{height},{width}), 0, 255, seed), RGB, divided by 255"
            for i in range(2)
        },
        "outputs": {
            "spatial_shapes": "(H,W) per level",
            "rows": "tokens at which *_rows arrays are sampled",
            "src_rows": "the encoder's input at rows",
            "memory_rows": "the decoder's input at rows: encoder, then its projection",
            "memory_stats*": "per image mean, std, abs-sum, min, max, count of the memory",
            "pred_logits": "class logits, last decoder layer, detection queries",
            "pred_boxes_all": "boxes cxcywh 0..1 of every decoder layer; eval: last layer only",
            "aux_logits_q3": "class logits of layers 0..L-2 for queries 0..2",
            "enc_logits, enc_boxes": "of the selected proposals",
            "topk_proposals": "token index of each query, best first",
            "post_scores, post_labels, post_boxes": "the image processor's detections, boxes in pixels",
            "dn_*": "denoising queries, as in the cases of DINO; the draws are in the order of DINO's",
            "match<c>_img<i>": "row 0 query, row 1 target, of matcher call c",
            "losses_weighted": "see loss_names: vfl is class, the last aux is enc, the last dn has no number",
            "grad_stats, grad_samples": "as in the cases of DINO",
            "bn_running_mean, bn_running_var": f"of {NORM} after the step",
        },
        "state_dict": shapes,
        "aliases": {},
        "noise_floor": floors,
        "min_decision_margin": margin,
        "precision": "arrays hold the arithmetic run in float64 rounded to float32 (losses, stats and "
        "gradients in float64); its float32 run differs by at most noise_floor",
        "informative_only": {"memory_stats*": "sums over many tokens; compare relative to noise_floor"},
        "notes": "images have as many objects each: unused denoising slots differ (box 0 there, 0.5 here)",
        **meta,
    }
    exact = ("losses", "loss_", "grad_", "memory_stats")
    stored = {
        key: value.astype(np.int32)
        if value.dtype.kind == "i"
        else value.astype(np.float32)
        if value.dtype.kind == "f" and not key.startswith(exact)
        else value
        for key, value in arrays.items()
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(case, separators=(",", ":")) + "\n")
    np.savez_compressed(FOLDER / f"{name}.npz", **stored)
    print(name, "selection margin", margin)


if __name__ == "__main__":
    torch.manual_seed(0)
    for seed, (name, options) in enumerate(CASES.items(), start=1801):
        make(name, seed, **options)
