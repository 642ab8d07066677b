"""Weights for another number of classes, and backbones under their own names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..modeling.denoising import ContrastiveDenoising
from ..modeling.heads import ClassHead
from ..modeling.proposals import ProposalHead
from .convert import rename_resnet_d, rename_swin, rename_torchvision


def class_tensors(model: nn.Module) -> dict[str, bool]:
    """Names of the parameters with a row per class; True where row 0 is the foreground's score.

    All class heads, also those of the proposals and of an encoder, and the label
    embedding of denoising.
    """
    names = {}
    for path, module in model.named_modules():
        if isinstance(module, ClassHead):
            owner = model.get_submodule(path.rpartition(".")[0])
            foreground = isinstance(owner, ProposalHead) and owner.class_agnostic
            names.update({f"{path}.weight": foreground, f"{path}.bias": foreground})
        elif isinstance(module, ContrastiveDenoising):
            names[f"{path}.label_embed.weight"] = False
    return names


def other_class_counts(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows in ``weights`` and in ``model`` of the ``class_tensors`` that differ in nothing else."""
    expected = model.state_dict()
    return {
        name: (len(weights[name]), len(expected[name]))
        for name in class_tensors(model)
        if name in weights
        and len(weights[name]) != len(expected[name])
        and weights[name].shape[1:] == expected[name].shape[1:]
    }


def adapt_classes(weights: dict[str, Tensor], model: nn.Module) -> str:
    """Makes ``weights`` fit another number of classes, in place.

    Tensors with a row per class take the values that ``model`` has now, in a new model those of
    its initialisation (class heads: the prior's bias). Only a foreground score is kept.

    Returns:
        What was done, for the log; empty if nothing.
    """
    changed = other_class_counts(weights, model)
    if not changed:
        return ""
    initial, foreground = model.state_dict(), class_tensors(model)
    for name in changed:
        rows = initial[name].clone()
        if foreground[name]:
            rows[0] = weights[name][0]
        weights[name] = rows
    patterns = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in changed)
    kept = "; the foreground's score is kept" if any(foreground[name] for name in changed) else ""
    old, new = class_counts(changed)
    return (
        f"fine-tuning from {old} to {new} classes: {len(changed)} tensors start anew "
        f"({', '.join(patterns)}){kept}"
    )


def class_counts(changed: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The weights' and the model's, as the heads tell: a label embedding may have one row more."""
    heads = [rows for name, rows in changed.items() if "label_embed" not in name]
    return (heads or list(changed.values()))[0]


def resnet_mismatch(model: nn.Module, origin: str | None) -> str:
    """A warning if a ResNet's weights belong to another kind of ResNet; they fit by their shapes.

    Args:
        origin: "torchvision" (stride in the 3x3 convolution, RGB) or "Caffe2" (detectron2's MSRA
            files: stride in the 1x1 convolution, BGR); others are not known.
    """
    built = resnet_kind(model)
    if built is None or origin not in ("torchvision", "Caffe2"):
        return ""
    return (
        ""
        if built == origin
        else (
            f"the backbone's weights come from {origin}'s kind of ResNet-50/101, but the model has "
            f"{built}'s, with the stride in another convolution and other input: they load, and give "
            "poor features. configs/models/backbones.py has both kinds"
        )
    )


def resnet_kind(model: nn.Module) -> str | None:
    """Whose kind of ResNet-50/101 the model has: "torchvision", "Caffe2", or None."""
    block = next(iter(getattr(getattr(model, "backbone", None), "res3", ())), None)
    if block is None or not hasattr(block, "conv3"):
        return None
    return "Caffe2" if max(block.conv1.stride) == 2 else "torchvision"


# Of a trained ResNet's first convolution: the norm of its filters, times the scale of the batch norm behind
# it. Caffe2's takes pixels of 0 to 255 (.017 in Keras' ResNet-50); torchvision's, of pixels divided by their
# deviation, is some 58 times larger.
_STEM_GAIN = 0.13


def resnet_origin(weights: Mapping[str, object]) -> str | None:
    """Whose kind of ResNet the weights are, by their first convolution; None if it does not tell.

    It does not where it was not trained: where its norm's bias is 0.
    """
    for name in weights:
        if match := re.fullmatch(r"((?:.*\.)?(?:stem\.)?)conv1\.weight", name):
            weight = torch.as_tensor(weights[name]).float()
            norm = f"{match[1]}conv1.norm" if f"{match[1]}conv1.norm.bias" in weights else f"{match[1]}bn1"
            if weight.dim() == 4 and weight.shape[1] == 3 and f"{norm}.bias" in weights:
                break
    else:
        return None
    scale, bias, variance = (
        torch.as_tensor(weights.get(f"{norm}.{part}", 1.0)).float()
        for part in ("weight", "bias", "running_var")
    )
    if not bias.any():
        return None
    gain = (weight.flatten(1).norm(dim=1) * scale / (variance + 1e-5).sqrt()).median()
    return "Caffe2" if gain < _STEM_GAIN else "torchvision"


def backbone_names(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """``weights`` of a backbone alone, under the model's names; None if they are no such thing.

    Knows the names of this model's backbone without their prefix (detectron2's; Swin as its
    authors publish it, also for torchvision's Swin), torchvision's ResNet (also timm's) and ResNet-D, and for
    a backbone that has its own rule (``renamed``) what this makes of them.
    """
    expected = model.state_dict().keys()
    own = getattr(getattr(model, "backbone", None), "renamed", dict)(weights)
    for named in (
        {f"backbone.{name}": value for name, value in own.items()},
        rename_torchvision(weights),
        rename_resnet_d(weights),
        rename_swin(weights),
    ):
        if len(named.keys() & expected) > len(weights.keys() & expected):
            return named
    return None
