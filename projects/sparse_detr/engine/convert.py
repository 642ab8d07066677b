"""Published checkpoints under this project's parameter names.

Two ways of naming are in use, each with its table of renaming rules here; names that only one method
has are in the ``published_names`` of its encoder. A third one, that of transformers, is in ``huggingface``.
Tensors that need more than a new name (split embeddings, class rows, shared heads stored several times)
follow below the tables. Nothing is dropped silently: the report lists what was left out and why, what is
missing and what is left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..modeling.encoder import Encoder
from ..modeling.meta_arch import SetDetector
from .huggingface import from_transformers

# detectron2's COCO category ids in contiguous order: row k of an 80-class head is category
# COCO_CATEGORY_IDS[k] of the 91 rows of the published heads.
_UNUSED_COCO_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORY_IDS = [i for i in range(1, 91) if i not in _UNUSED_COCO_IDS]

_POSITION_TEMPERATURES = {
    "dino": "20 (offset 0)",
    "detrex": "10000 (offset -0.5) after 12 epochs and 20 (offset 0) after 24 or 36",
}

Rule = tuple[str, str]
Split = Callable[[Tensor], list[tuple[str, Tensor]]]  # one tensor to several, with their names

# torchvision's ResNet, as the original repositories wrap it.
_RESNET: list[Rule] = [
    (r"^backbone\.0\.body\.conv1\.", "backbone.stem.conv1."),
    (r"^backbone\.0\.body\.bn1\.", "backbone.stem.conv1.norm."),
    *((rf"^backbone\.0\.body\.layer{n}\.", f"backbone.res{n + 1}.") for n in (1, 2, 3, 4)),
    (r"^(backbone\.res\d\.\d+\.)bn(\d)\.", r"\1conv\2.norm."),
    (r"^(backbone\.res\d\.\d+\.)downsample\.0\.", r"\1shortcut."),
    (r"^(backbone\.res\d\.\d+\.)downsample\.1\.", r"\1shortcut.norm."),
    (r"^backbone\.0\.(body\.)?", "backbone."),  # Swin keeps its names
]

# The authors' repositories, which follow Deformable DETR's: fundamentalvision/Deformable-DETR,
# kakaobrain/sparse-detr, HDETR/H-Deformable-DETR, IDEA-Research/DINO, IDEA-Research/Lite-DETR.
# These without the backbone, which others wrap otherwise.
_PARTS: list[Rule] = [
    (r"^input_proj\.(\d+)\.0\.", r"neck.convs.\1."),
    (r"^input_proj\.(\d+)\.1\.", r"neck.norms.\1."),
    (r"^(transformer\.encoder\.layers\.\d+\.)self_attn\.", r"\1attention."),
    (r"^(transformer\.encoder\.layers\.\d+\.)norm1\.", r"\1norm."),
    (r"^(transformer\.encoder\.layers\.\d+\.)norm2\.", r"\1ffn.norm."),
    (r"^(transformer\.decoder\.layers\.\d+\.)self_attn\.", r"\1self_attention."),
    (r"^(transformer\.decoder\.layers\.\d+\.)cross_attn\.", r"\1cross_attention."),
    (r"^(transformer\.decoder\.layers\.\d+\.)norm1\.", r"\1cross_norm."),
    (r"^(transformer\.decoder\.layers\.\d+\.)norm2\.", r"\1self_norm."),
    (r"^(transformer\.decoder\.layers\.\d+\.)norm3\.", r"\1ffn.norm."),
    (r"^(transformer\.\w+\.layers\.\d+\.)(linear[12])\.", r"\1ffn.\2."),
    (r"^transformer\.enc_output\.", "transformer.proposal_head.projection."),
    (r"^transformer\.enc_output_norm\.", "transformer.proposal_head.norm."),
    (r"^transformer\.pos_trans\.", "transformer.query_selection.position_proj."),
    (r"^transformer\.pos_trans_norm\.", "transformer.query_selection.position_norm."),
    (r"^transformer\.reference_points\.", "transformer.query_selection.reference_points."),
    # DINO has some more
    (r"^transformer\.decoder\.ref_point_head\.", "transformer.decoder.position_mlp."),
    (r"^transformer\.tgt_embed\.", "transformer.query_selection.content."),
    (r"^transformer\.enc_out_class_embed\.", "transformer.proposal_head.class_head."),
    (r"^transformer\.enc_out_bbox_embed\.", "transformer.proposal_head.box_head."),
    (r"^label_enc\.", "transformer.denoising.label_embed."),
]
_AUTHORS = [*_RESNET, *_PARTS]

# IDEA-Research/detrex and huawei-noah/noah-research: Deformable DETR, DINO and Focus-DETR.
_DETREX: list[Rule] = [
    (r"^neck\.convs\.(\d+)\.conv\.", r"neck.convs.\1."),
    (r"^neck\.convs\.(\d+)\.norm\.", r"neck.norms.\1."),
    (r"^transformer\.level_embeds$", "transformer.level_embed"),
    (r"^transformer\.tgt_embed\.", "transformer.query_selection.content."),
    (r"^transformer\.enc_output\.", "transformer.proposal_head.projection."),
    (r"^transformer\.enc_output_norm\.", "transformer.proposal_head.norm."),
    (r"^(transformer\.encoder\.layers\.\d+\.)attentions\.0\.", r"\1attention."),
    (r"^(transformer\.encoder\.layers\.\d+\.)norms\.0\.", r"\1norm."),
    (r"^(transformer\.encoder\.layers\.\d+\.)norms\.1\.", r"\1ffn.norm."),
    (r"^(transformer\.decoder\.layers\.\d+\.)attentions\.0\.attn\.", r"\1self_attention."),
    (r"^(transformer\.decoder\.layers\.\d+\.)attentions\.1\.", r"\1cross_attention."),
    (r"^(transformer\.decoder\.layers\.\d+\.)norms\.0\.", r"\1self_norm."),
    (r"^(transformer\.decoder\.layers\.\d+\.)norms\.1\.", r"\1cross_norm."),
    (r"^(transformer\.decoder\.layers\.\d+\.)norms\.2\.", r"\1ffn.norm."),
    (r"^(transformer\.\w+\.layers\.\d+\.)ffns\.0\.layers\.0\.0\.", r"\1ffn.linear1."),
    (r"^(transformer\.\w+\.layers\.\d+\.)ffns\.0\.layers\.1\.", r"\1ffn.linear2."),
    (r"^transformer\.decoder\.ref_point_head\.", "transformer.decoder.position_mlp."),
    (r"^label_enc\.", "transformer.denoising.label_embed."),
    # Deformable DETR's
    (r"^transformer\.pos_trans\.", "transformer.query_selection.position_proj."),
    (r"^transformer\.pos_trans_norm\.", "transformer.query_selection.position_norm."),
    (r"^transformer\.reference_points\.", "transformer.query_selection.reference_points."),
]

# The Swin authors' names -> torchvision's, in which stages and the steps down behind them alternate.
_SWIN: list[Rule] = [
    (r"^patch_embed\.proj\.", "features.0.0."),
    (r"^patch_embed\.norm\.", "features.0.2."),
    *((rf"^layers\.{s}\.blocks\.", f"features.{2 * s + 1}.") for s in range(4)),
    *((rf"^layers\.{s}\.downsample\.", f"features.{2 * s + 2}.") for s in range(3)),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
]

# microsoft/FocalNet's names -> timm's, whose stages begin with the step down; of the large models, with norms
# behind what they norm. The norms of the outputs are the detector's.
_FOCALNET: list[Rule] = [
    (r"^backbone\.0\.patch_embed\.", "backbone.body.stem."),
    *((rf"^backbone\.0\.layers\.{s}\.blocks\.", f"backbone.body.layers_{s}.blocks.") for s in range(4)),
    *(
        (rf"^backbone\.0\.layers\.{s}\.downsample\.", f"backbone.body.layers_{s + 1}.downsample.")
        for s in range(3)
    ),
    (r"^(backbone\.body\.layers_\d\.blocks\.\d+\.)norm([12])\.", r"\1norm\2_post."),
    (r"^(backbone\.body\.layers_\d\.blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma"),
    *((rf"^backbone\.1\.norm{s}\.", f"backbone.output_norms.stride{4 * 2**s}.") for s in range(4)),
]

# xiuqhou/Salience-DETR.
_XIUQHOU: list[Rule] = [
    *_FOCALNET,
    (r"^backbone\.(conv1|bn1|layer\d)\.", r"backbone.0.body.\1."),  # torchvision's, not wrapped
    *_RESNET,
    (r"^neck\.convs\.(\d+)\.0\.", r"neck.convs.\1."),
    (r"^neck\.convs\.(\d+)\.1\.", r"neck.norms.\1."),
    (r"^transformer\.level_embeds$", "transformer.level_embed"),
    (r"^transformer\.neck\.", "transformer.fusion."),
    (r"^transformer\.encoder_class_head\.", "transformer.proposal_head.class_head."),
    (r"^transformer\.encoder_bbox_head\.", "transformer.proposal_head.box_head."),
    (r"^transformer\.decoder\.class_head\.", "transformer.heads.class_heads."),
    (r"^transformer\.decoder\.bbox_head\.", "transformer.heads.box_heads."),
    (r"^denoising_generator\.label_encoder\.", "transformer.denoising.label_embed."),
    *_PARTS,
]

# PaddlePaddle's ResNet-D, as lyuwenyu/RT-DETR names it.
_RESNET_D: list[Rule] = [
    (r"^backbone\.conv1\.conv1_(\d)\.", r"backbone.stem.conv\1."),
    *((rf"^backbone\.res_layers\.{n}\.blocks\.", f"backbone.res{n + 2}.") for n in range(4)),
    *((rf"^(backbone\.res\d\.\d+)\.branch2{x}\.", rf"\1.conv{n}.") for n, x in enumerate("abc", start=1)),
    (r"^(backbone\.res\d\.\d+)\.short\.conv\.(conv|norm)\.", r"\1.shortcut.1.\2."),
    (r"^(backbone\.res\d\.\d+)\.short\.", r"\1.shortcut."),
    (r"^(backbone\..+)\.conv\.", r"\1."),
]

# lyuwenyu/RT-DETR.
_LYUWENYU: list[Rule] = [
    *_RESNET_D,
    (r"^encoder\.input_proj\.(\d+)\.0\.", r"neck.convs.\1."),
    (r"^encoder\.input_proj\.(\d+)\.1\.", r"neck.norms.\1."),
    (r"^decoder\.decoder\.(layers\.\d+\.)norm1\.", r"transformer.decoder.\1self_norm."),
    (r"^decoder\.decoder\.(layers\.\d+\.)norm2\.", r"transformer.decoder.\1cross_norm."),
    (r"^decoder\.decoder\.", "transformer.decoder."),
    (r"^decoder\.enc_output\.0\.", "transformer.proposal_head.projection."),
    (r"^decoder\.enc_output\.1\.", "transformer.proposal_head.norm."),
    (r"^decoder\.enc_score_head\.", "transformer.proposal_head.class_head."),
    (r"^decoder\.enc_bbox_head\.", "transformer.proposal_head.box_head."),
    (r"^decoder\.dec_score_head\.", "transformer.heads.class_heads."),
    (r"^decoder\.dec_bbox_head\.", "transformer.heads.box_heads."),
    (r"^decoder\.query_pos_head\.", "transformer.decoder.position_mlp."),
    (r"^decoder\.denoising_class_embed\.", "transformer.denoising.label_embed."),
    *_PARTS,
]

# transformers' names are in ``huggingface``.
_RULES = {
    "authors": _AUTHORS,
    "detrex": _DETREX,
    "xiuqhou": _XIUQHOU,
    "lyuwenyu": _LYUWENYU,
    "transformers": [],
}


# Class names and frequencies of the position code, which xiuqhou's models keep among their weights.
_CONSTANTS = (r"^_classes_$", r"^position_embedding\.dim_t[xy]$")


@dataclass(frozen=True)
class Family:
    """marker: a key only this family has. naming: one of ``_RULES``, see ``Encoder.published_names``."""

    marker: str
    naming: str


# In the order in which they are looked for: the first two have Deformable DETR's names and some more.
FAMILIES = {
    "salience": Family(r"transformer\.encoder\.background_embedding\.", "xiuqhou"),
    "dino": Family(r"transformer\.enc_out_class_embed\.", "authors"),
    "deformable": Family(r"transformer\.encoder\.layers\.\d+\.self_attn\.", "authors"),
    "detrex": Family(r"transformer\.encoder\.layers\.\d+\.attentions\.", "detrex"),
    "rt_detr": Family(r"encoder\.fpn_blocks\.", "lyuwenyu"),
    "transformers": Family(r"model\.decoder\.layers\.\d+\.encoder_attn\.sampling_offsets\.", "transformers"),
}


@dataclass
class ConversionReport:
    """What became of every key.

    ignored maps dropped source keys to the reason; missing and unexpected are the model's unfilled
    and the checkpoint's left-over keys after renaming; notes are for the user to read.
    """

    family: str
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.missing and not self.unexpected


def detect_family(keys: Mapping[str, object]) -> str | None:
    """The published family a checkpoint belongs to, or None if its names are not known."""
    for name, family in FAMILIES.items():
        if any(re.match(family.marker, key) for key in keys):
            return name
    return None


def convert_state_dict(
    state_dict: Mapping[str, Tensor], model: SetDetector
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Rename and reshape a published ``state_dict`` for ``model``.

    Raises:
        ValueError: the names belong to no known family.
    """
    name = detect_family(state_dict)
    if name is None:
        raise UserError(
            "unknown checkpoint: its keys (e.g. "
            f"{', '.join(list(state_dict)[:3])}) match none of {', '.join(FAMILIES)}"
        )
    encoder, naming = model.transformer.encoder, FAMILIES[name].naming
    report = ConversionReport(family=name)
    if naming == "transformers":
        state_dict = from_transformers(state_dict, model)
    expected = model.state_dict()
    reverse = {f"transformer.encoder.{name}" for name in encoder.published_reversed}
    renamed: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if setting := _setting(key, encoder):
            report.ignored[key] = f"{setting}, which comes from the config"
            if (differs := _differs(setting, tensor, encoder)) is not None:
                report.notes.append(differs)
            continue
        target = _rename(key, naming, model)
        if re.search(r"(total_ops|total_params|num_batches_tracked)$", key) and target not in expected:
            report.ignored[key] = "a counter"
            continue
        if target is None:
            report.ignored[key] = "a second name of a shared head"
            continue
        for new_key, value in [(target, tensor)] if isinstance(target, str) else target(tensor):
            if new_key in renamed and not torch.equal(renamed[new_key], value):
                raise UserError(
                    f"{key} and another key both become {new_key} but differ: the model shares "
                    "what the checkpoint keeps apart (heads per layer?)"
                )
            if new_key in expected and expected[new_key].shape == (*value.shape, 1, 1):
                value = value[..., None, None]  # a linear layer; here, a 1x1 convolution
            renamed[new_key] = value.flip(0) if new_key in reverse else value
    unused = "|".join((r"^transformer\.denoising\.", *_CONSTANTS, *encoder.published_unused))
    for key in [k for k in renamed if k not in expected and re.search(unused, k)]:
        report.ignored[key] = "not used by this model"
        del renamed[key]
    renamed = _fit_classes(renamed, expected, model, report)
    report.notes += encoder.published_notes()
    published = _POSITION_TEMPERATURES.get(name)
    if published and getattr(model.transformer, "denoising", None) is not None:  # DINO's
        report.notes.append(
            f"model.transformer.position.temperature={model.transformer.position.temperature:g} "
            f"comes from the config, the weights do not tell: published are {published}"
        )
    for key in expected:  # a published norm that was frozen has no counter
        if (
            key.endswith(".num_batches_tracked")
            and key.replace("num_batches_tracked", "running_var") in renamed
        ):
            renamed.setdefault(key, torch.zeros_like(expected[key]))
    report.missing = [k for k in expected if k not in renamed]
    report.unexpected = [k for k in renamed if k not in expected]
    return renamed, report


def _setting(key: str, encoder: Encoder) -> str | None:
    """The attribute of ``encoder`` that the tensor ``key`` holds, if it is a setting."""
    found = (name for pattern, name in encoder.published_settings.items() if re.search(pattern, key))
    return next(found, None)


def _differs(setting: str, published: Tensor, encoder: Encoder) -> str | None:
    """What to tell the user where the weights come with another value than the model has."""
    theirs, ours = published.flatten().tolist(), list(getattr(encoder, setting))
    if len(theirs) == len(ours) and all(abs(a - b) < 1e-6 for a, b in zip(theirs, ours)):
        return None
    return (
        f"model.transformer.encoder.{setting}={ours} comes from the config; the weights were trained with "
        f"{[round(x, 6) for x in theirs]}"
    )


def rename_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet of torchvision (or timm) under the names of this project's ``backbone``."""
    out = {}
    for key, value in state_dict.items():
        if re.match(r"(conv1|bn1|layer\d)\.", key) and not key.endswith("num_batches_tracked"):
            out[_apply(_RESNET, f"backbone.0.body.{key}")] = value
    return out


def rename_resnet_d(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet-D as RT-DETR's authors publish it under the names of this project's ``backbone``."""
    out = {}
    for key, value in state_dict.items():
        if re.match(r"(conv1\.conv1_|res_layers\.)\d\.", key) and not key.endswith("num_batches_tracked"):
            out[_apply(_RESNET_D, f"backbone.{key}")] = value
    return out


def rename_swin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin Transformer of its authors under torchvision's names, as the part ``backbone``."""
    out = {}
    for key, value in state_dict.items():
        if re.match(r"(patch_embed|layers\.\d)\.", key) and not key.endswith("relative_position_index"):
            out[f"backbone.{_apply(_SWIN, key)}"] = value
    return out


def _apply(rules: list[Rule], key: str) -> str:
    """Every rule in turn."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _rename(key: str, naming: str, model: SetDetector) -> str | Split | None:
    """The new name, how to split the tensor, or None to drop it."""
    if re.match(r"transformer\.(encoder|decoder)\.(class|bbox)_embed\.", key):
        return None
    if match := re.match(r"(class|bbox)_embed\.(\d+)\.(.*)", key):
        return _head_name(match[1], int(match[2]), match[3], model)
    if key in ("query_embed.weight", "query_embedding.weight"):  # the second: detrex
        if isinstance(getattr(model.transformer.query_selection, "position", None), nn.Embedding):
            return _split_query_embed
        return "transformer.query_selection.content.weight"
    if match := re.match(r"neck\.extra_convs\.(\d+)\.(conv|norm)\.(.*)", key):  # detrex
        return f"neck.{match[2]}s.{int(match[1]) + model.neck.num_inputs}.{match[3]}"
    for pattern, replacement in model.transformer.encoder.published_names.get(naming, ()):
        if re.search(pattern, key):
            return f"transformer.encoder.{re.sub(pattern, replacement, key)}"
    return _apply(_RULES[naming], key)


def _head_name(kind: str, index: int, rest: str, model: SetDetector) -> str:
    """Where head ``index`` of the published per-layer lists lives.

    Decoder layers come first, then the proposals' head, then those behind the encoder's layers.
    """
    heads = {"class": "class_heads", "bbox": "box_heads"}[kind]
    num_layers = model.transformer.heads.num_layers
    if index < num_layers:
        slot = min(index, len(model.transformer.heads.class_heads) - 1)
        return f"transformer.heads.{heads}.{slot}.{rest}"
    if index == num_layers:
        return f"transformer.proposal_head.{heads[:-1]}.{rest}"
    behind_layers = model.transformer.encoder.published_heads
    return f"transformer.encoder.{behind_layers}.{heads}.{index - num_layers - 1}.{rest}"


def _split_query_embed(weight: Tensor) -> list[tuple[str, Tensor]]:
    """(Q, 2C): positions, then contents."""
    prefix = "transformer.query_selection."
    position, content = weight.chunk(2, dim=1)
    return [(prefix + "position.weight", position), (prefix + "content.weight", content)]


def _fit_classes(
    renamed: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    model: SetDetector,
    report: ConversionReport,
) -> dict[str, Tensor]:
    """Pick the rows of 91-way heads (one per COCO category id) for an 80-class model."""
    out = dict(renamed)
    for key, value in renamed.items():
        if key not in expected or value.shape == expected[key].shape:
            continue
        extra = int(value.shape[0] == 92)  # denoising labels end with one that is never drawn
        if value.shape[0] == 91 + extra and expected[key].shape[0] in (80, 80 + extra):
            rows = torch.tensor(COCO_CATEGORY_IDS + [91])[: expected[key].shape[0]]
            head = model.transformer.proposal_head
            if "proposal_head" in key and head is not None and head.class_agnostic:
                rows[0] = 0  # the foreground score
            out[key] = value[rows]
            report.notes.append(f"{key}: {value.shape[0]} rows by category id -> {len(rows)}")
    return out
