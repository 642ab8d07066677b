"""A Deformable DETR as a folder that Hugging Face's ``transformers`` loads."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..modeling.encoder import DenseEncoder
from ..modeling.meta_arch import SetDetector
from ..modeling.proposals import LearnedQueries, ProposalQueries
from .fine_tune import resnet_kind
from .huggingface import to_transformers

logger = logging.getLogger(__name__)

# timm's names of ResNets, by their kind of block and the number of blocks per stage.
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
}


def save_transformers(
    model: SetDetector,
    folder: str | os.PathLike,
    *,
    class_names: Sequence[str] | None = None,
    short_edge: int = 800,
    max_size: int = 1333,
) -> None:
    """Writes ``model.safetensors``, ``config.json`` and ``preprocessor_config.json`` into ``folder``:
    what ``DeformableDetrForObjectDetection.from_pretrained`` and ``AutoImageProcessor`` load.

    Args:
        class_names: of the model's classes, in their order.
        short_edge, max_size: to which images are resized, in pixels.

    Raises:
        UserError: transformers has no such model, or the package safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError("writing model.safetensors needs a package: pip install safetensors") from error
    config = _config(model)
    names = class_names or [str(index) for index in range(model.num_classes)]
    if len(names) != model.num_classes:
        raise UserError(f"class_names: {len(names)} names for a model of {model.num_classes} classes")
    config["id2label"] = {str(index): name for index, name in enumerate(names)}
    config["label2id"] = {name: index for index, name in enumerate(names)}
    processor = {
        "image_processor_type": "DeformableDetrImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": short_edge, "longest_edge": max_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": (model.pixel_mean.flatten().double() / 255).tolist(),
        "image_std": (model.pixel_std.flatten().double() / 255).tolist(),
        "do_pad": True,
    }
    os.makedirs(folder, exist_ok=True)
    save_file(to_transformers(model), os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        with open(os.path.join(folder, name), "w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")


def _config(model: SetDetector) -> dict:
    """transformers' ``config.json`` for the model, in terms that its versions 4 and 5 read."""
    transformer = model.transformer
    encoder: Any = transformer.encoder
    decoder, selection = transformer.decoder, transformer.query_selection
    two_stage = isinstance(selection, ProposalQueries)
    depths = tuple(len(getattr(model.backbone, f"res{n}", ())) for n in (2, 3, 4, 5))
    bottleneck = all(hasattr(block, "conv3") for block in getattr(model.backbone, "res2", ()))
    position = transformer.position
    wrong = {
        "a ResNet of torchvision's kind as its backbone": (bottleneck, depths) not in _RESNETS
        or resnet_kind(model) == "Caffe2"
        or len(model.in_features) != 3,
        "input in RGB": model.input_format != "RGB",
        "a dense encoder": type(encoder) is not DenseEncoder,
        "learned queries, or two stages as in its paper": type(selection)
        not in (LearnedQueries, ProposalQueries)
        or (two_stage and selection.content_from_memory),
        "heads per layer where boxes are refined, shared ones elsewhere": decoder.refine
        != (len(transformer.heads.class_heads) == transformer.heads.num_layers),
        "position codes of temperature 10000 and offset -0.5": (position.temperature, position.offset)
        != (10000, -0.5),
    }
    if unlike := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise UserError(
            f"transformers' Deformable DETR has {'; '.join(unlike)}: this model is another one. "
            "Those of deformable_detr_r50_50ep, deformable_detr_r50_refine_50ep and "
            "deformable_detr_r50_two_stage_50ep can be written"
        )
    if model.exact_sizes or model.pad_features:
        logger.warning(
            "model.exact_sizes=%s and model.pad_features=%s: transformers has neither, and its boxes lie "
            "a little beside this model's (docs/reference_points.md)",
            str(model.exact_sizes).lower(),
            str(model.pad_features).lower(),
        )
    first: Any = encoder.layers[0]
    last: Any = decoder.layers[0]
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "backbone": _RESNETS[bottleneck, depths],
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "d_model": first.ffn.linear1.in_features,
        "num_feature_levels": first.attention.num_levels,
        "encoder_layers": len(encoder.layers),
        "decoder_layers": len(decoder.layers),
        "encoder_ffn_dim": first.ffn.linear1.out_features,
        "decoder_ffn_dim": last.ffn.linear1.out_features,
        "encoder_attention_heads": first.attention.num_heads,
        "decoder_attention_heads": last.cross_attention.num_heads,
        "encoder_n_points": first.attention.num_points,
        "decoder_n_points": last.cross_attention.num_points,
        "num_queries": selection.num_queries,
        "two_stage": two_stage,
        "two_stage_num_proposals": selection.num_queries,
        "with_box_refine": decoder.refine,
    }
