"""Names of Deformable DETR's and RT-DETR's weights in Hugging Face's ``transformers``, and in this project.

One table of names serves both directions; RT-DETR, which has some more, is only read. Three things are more
than a name: self-attention between tokens or queries is stored as three projections, positions and contents
of learned queries as one embedding, and heads that layers share are stored once, or under two names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UserError
from ..modeling.meta_arch import SetDetector

# (transformers', ours), beginnings of names; # is a number. Of several that fit a name, the longest counts.
_NAMES: list[tuple[str, str]] = [
    ("model.backbone.conv_encoder.model.conv1.", "backbone.stem.conv1."),
    ("model.backbone.conv_encoder.model.bn1.", "backbone.stem.conv1.norm."),
    *(
        (f"model.backbone.conv_encoder.model.layer{n}.#.{theirs}.", f"backbone.res{n + 1}.#.{ours}.")
        for n in (1, 2, 3, 4)
        for theirs, ours in (
            ("conv#", "conv#"),
            ("bn#", "conv#.norm"),
            ("downsample.0", "shortcut"),
            ("downsample.1", "shortcut.norm"),
        )
    ),
    ("model.input_proj.#.0.", "neck.convs.#."),
    ("model.input_proj.#.1.", "neck.norms.#."),
    ("model.level_embed", "transformer.level_embed"),
    ("model.encoder.layers.#.self_attn.", "transformer.encoder.layers.#.attention."),
    ("model.encoder.layers.#.self_attn_layer_norm.", "transformer.encoder.layers.#.norm."),
    ("model.decoder.layers.#.self_attn.", "transformer.decoder.layers.#.self_attention."),
    ("model.decoder.layers.#.self_attn_layer_norm.", "transformer.decoder.layers.#.self_norm."),
    ("model.decoder.layers.#.encoder_attn.", "transformer.decoder.layers.#.cross_attention."),
    ("model.decoder.layers.#.encoder_attn_layer_norm.", "transformer.decoder.layers.#.cross_norm."),
    *(
        (f"model.{part}.layers.#.{theirs}.", f"transformer.{part}.layers.#.ffn.{ours}.")
        for part in ("encoder", "decoder")
        for theirs, ours in (("fc1", "linear1"), ("fc2", "linear2"), ("final_layer_norm", "norm"))
    ),
    ("model.reference_points.", "transformer.query_selection.reference_points."),
    ("model.pos_trans.", "transformer.query_selection.position_proj."),
    ("model.pos_trans_norm.", "transformer.query_selection.position_norm."),
    ("model.enc_output.", "transformer.proposal_head.projection."),
    ("model.enc_output_norm.", "transformer.proposal_head.norm."),
]
# What RT-DETR has beside these; the names of its encoder are in the encoder's ``published_names``.
_BACKBONE = "model.backbone.conv_encoder.model"
_RT_DETR: list[tuple[str, str]] = [
    *(
        (f"{_BACKBONE}.{theirs}.{their_part}.", f"backbone.{ours}{our_part}.")
        for theirs, ours in (
            *((f"embedder.embedder.{n}", f"stem.conv{n + 1}") for n in range(3)),
            *(
                (f"encoder.stages.{stage}.layers.#.{name}", f"res{stage + 2}.#.{our_name}")
                for stage in range(4)
                for name, our_name in (
                    *((f"layer.{n}", f"conv{n + 1}") for n in range(3)),
                    ("shortcut", "shortcut"),
                    ("shortcut.1", "shortcut.1"),
                )
            ),
        )
        for their_part, our_part in (("convolution", ""), ("normalization", ".norm"))
    ),
    ("model.encoder_input_proj.#.0.", "neck.convs.#."),
    ("model.encoder_input_proj.#.1.", "neck.norms.#."),
    ("model.enc_output.0.", "transformer.proposal_head.projection."),
    ("model.enc_output.1.", "transformer.proposal_head.norm."),
    ("model.enc_score_head.", "transformer.proposal_head.class_head."),
    ("model.enc_bbox_head.", "transformer.proposal_head.box_head."),
    ("model.weight_embedding.", "transformer.query_selection.content."),
    ("model.decoder.query_pos_head.", "transformer.decoder.position_mlp."),
    ("model.denoising_class_embed.", "transformer.denoising.label_embed."),
]
_QUERIES = "model.query_position_embeddings.weight"

# Names in the memory of transformers 5 that are others in its files, which are still those of version 4.
_IN_MEMORY = [
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"(\.layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    (r"(\.self_attn)\.o_proj\.", r"\1.out_proj."),
    (r"^model\.encoder\.aifi\.", "model.encoder.encoder."),
]


def _renamed(key: str, names: list[tuple[str, str]]) -> str | None:
    """``key`` with its longest known beginning replaced; None if none is known."""
    for old, new in sorted(names, key=lambda pair: -len(pair[0])):
        if match := re.match(re.escape(old).replace(r"\#", r"(\d+)"), key):
            for number in match.groups():
                new = new.replace("#", number, 1)
            return new + key[match.end() :]
    return None


def from_transformers(state_dict: Mapping[str, Tensor], model: SetDetector) -> dict[str, Tensor]:
    """The weights of a ``DeformableDetrForObjectDetection`` or ``RTDetrForObjectDetection`` under this
    project's names.

    Heads (``class_embed.N``, ``bbox_embed.N``) and learned queries (``query_embed``) get the names that
    they have in the authors' files instead: ``engine.convert`` knows their places. Names that are not
    known stay as they are, RT-DETR's encoder's too.

    Args:
        model: tells how many heads there are, where the file has one for all.

    Raises:
        UserError: a part of a projection is missing, or a head has two names and two values.
    """
    named: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        for pattern, replacement in _IN_MEMORY:
            key = re.sub(pattern, replacement, key)
        head = re.fullmatch(r"(?:model\.decoder\.)?((?:class|bbox)_embed\.\d+\..*)", key)
        key = head[1] if head else "query_embed.weight" if key == _QUERIES else key
        if key in named and not torch.equal(named[key], value):
            raise UserError(f"{key} and model.decoder.{key} are two names of one head, but differ")
        named[key] = value
    _merge_projections(named)
    _repeat_heads(named, model)
    return {_renamed(key, [*_NAMES, *_RT_DETR]) or key: value for key, value in named.items()}


def _merge_projections(named: dict[str, Tensor]) -> None:
    """Self-attention's q, k and v of (C, C) to one projection of (3C, C), in place."""
    for key in [k for k in named if re.search(r"\.self_attn\.q_proj\.", k)]:
        parts = [key.replace(".q_proj.", f".{name}_proj.") for name in "qkv"]
        if missing := [part for part in parts if part not in named]:
            raise UserError(f"the weights hold {key}, but not {missing[0]}")
        merged = torch.cat([named.pop(part) for part in parts])
        named[key.replace(".q_proj.", ".in_proj_")] = merged


def _repeat_heads(named: dict[str, Tensor], model: SetDetector) -> None:
    """A head that is stored once is that of all layers, and of the proposals, in place."""
    of_proposals = model.transformer.proposal_head is not None and "model.enc_score_head.weight" not in named
    count = model.transformer.heads.num_layers + of_proposals
    for kind in ("class", "bbox"):
        heads = [key for key in named if key.startswith(f"{kind}_embed.")]
        if {key.split(".")[1] for key in heads} == {"0"}:
            for key in heads:
                rest = key.removeprefix(f"{kind}_embed.0")
                named.update({f"{kind}_embed.{index}{rest}": named[key] for index in range(count)})


def to_transformers(model: SetDetector) -> dict[str, Tensor]:
    """The weights of a Deformable DETR, on the CPU, by the names that transformers gives them in its files.

    Raises:
        UserError: the model has a part that transformers' has not.
    """
    tensors: dict[str, Tensor] = {}
    reverse = [(ours, theirs) for theirs, ours in _NAMES]
    for key, value in model.state_dict().items():
        if re.match(r"transformer\.(heads|proposal_head\.(class|box)_head)\.", key):
            continue  # below
        if key == "transformer.query_selection.position.weight":
            content = model.state_dict()[key.replace(".position.", ".content.")]
            tensors[_QUERIES] = torch.cat([value, content], dim=1)
        elif match := re.search(r"\.self_attention\.in_proj_(weight|bias)$", key):
            prefix = str(_renamed(key, reverse)).removesuffix(f"in_proj_{match[1]}")
            for name, part in zip("qkv", value.chunk(3)):
                tensors[f"{prefix}{name}_proj.{match[1]}"] = part
        elif key != "transformer.query_selection.content.weight":
            known = _renamed(key, reverse)
            if known is None:
                raise UserError(
                    f"transformers has no such Deformable DETR: nothing in it corresponds to {key}"
                )
            tensors[known] = value
    tensors.update(_heads(model))
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _heads(model: SetDetector) -> dict[str, Tensor]:
    """Once where all layers share them; else each, those that the decoder uses also under its name."""
    heads, proposals = model.transformer.heads, model.transformer.proposal_head
    class_heads, box_heads = list(heads.class_heads), list(heads.box_heads)
    if proposals is not None:
        class_heads.append(proposals.class_head)
        box_heads.append(proposals.box_head)
    tensors = {}
    for kind, modules, in_decoder in (
        ("class", class_heads, proposals is not None),
        ("bbox", box_heads, model.transformer.decoder.refine),
    ):
        for index, module in enumerate(modules):
            for name, value in module.state_dict().items():
                tensors[f"{kind}_embed.{index}.{name}"] = value
                if in_decoder:
                    tensors[f"model.decoder.{kind}_embed.{index}.{name}"] = value
    return tensors
