"""Any convolutional (or hierarchical) network of ``timm`` as a detectron2 backbone.

``timm`` is optional: nothing of it is imported before a model of it is built.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ..errors import UserError, listed
from .backbone import folded_norm

STRIDES = ("stride8", "stride16", "stride32")
_UNIT = 32  # pixels: networks that need their input to be whole cells get it so


class TimmBackbone(Backbone):
    """A feature extractor of timm (``timm.create_model(name, features_only=True)``).

    Outputs ``stride{s}`` for the strides s in ``out_features``, (B, C_s, ceil(H / s), ceil(W / s)); images of
    any size. Networks that would drop what is left at the right and the bottom border, or refuse it, see
    zeros (the mean colour) there, up to the next multiple of 32. Input is RGB, normalised with
    ``pixel_mean`` and ``pixel_std``, which are those of timm's weights.

    Args:
        name: as in ``timm.list_models()``; a tag behind it (``resnet18.a1_in1k``) names its weights, which
            ``train.init_checkpoint`` loads, not this.
        out_features: the maps that are wanted, ``"stride8"`` and so on.
        freeze_at: as detectron2's: 0 freezes nothing, 1 the stem, 2 the first stage as well: all that the map
            of stride ``2 ** freeze_at`` is computed from.
        freeze: parts of timm's model that do not train either, "layers_1.downsample" and so on.
        norm: of batch norms, "FrozenBN" (and folded into the convolutions), "BN" or "SyncBN"; what is frozen
            has frozen ones. Other norms stay as they are.
        output_norm: a LayerNorm over the channels of each map, as detectors on transformers have it.
        options: more arguments of ``timm.create_model``, such as ``drop_path_rate``.

    Raises:
        UserError: timm is not installed, has no such model, or the model has no such maps.
    """

    input_format = "RGB"

    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str] = STRIDES,
        freeze_at: int = 2,
        freeze: Sequence[str] = (),
        norm: str = "FrozenBN",
        output_norm: bool = False,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if norm not in ("FrozenBN", "BN", "SyncBN"):
            raise UserError(f"model.backbone.norm={norm}: expected FrozenBN, BN or SyncBN")
        layout = _layout(name, options)
        maps = [layout.maps[stride] for stride in _wanted(layout, out_features)]
        if list(maps) != sorted(maps, key=lambda m: m.index):
            raise UserError(f"model.backbone.out_features={list(out_features)}: expected the finest first")
        self.body = _create(name, options, out_indices=tuple(m.index for m in maps))
        frozen = _frozen(layout, freeze_at).union(*(_inside(self.body, part) for part in freeze))
        self.pixel_mean = [255 * value for value in layout.mean]
        self.pixel_std = [255 * value for value in layout.std]
        self._pad, self._channels_last = layout.pad, layout.channels_last
        for parameter_name, parameter in self.body.named_parameters():
            if parameter_name in frozen:
                parameter.requires_grad_(False)
        if norm == "SyncBN":
            self.body = _timm().layers.convert_sync_batchnorm(self.body)
        for path, module in list(self.body.named_modules()):
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and (
                norm == "FrozenBN" or f"{path}.weight" in frozen
            ):
                self.body.set_submodule(path, _FrozenNorm(module))
        for conv, after in layout.normed:
            _fold(self.body, conv, after)
        self.output_norms = nn.ModuleDict()
        if output_norm:
            self.output_norms = nn.ModuleDict(
                {f: nn.LayerNorm(m.channels) for f, m in zip(out_features, maps)}
            )
        self._out_features = list(out_features)
        self._out_feature_strides = {f: m.stride for f, m in zip(out_features, maps)}
        self._out_feature_channels = {f: m.channels for f, m in zip(out_features, maps)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps (B, C_s, H_s, W_s) by name."""
        height, width = x.shape[-2:]
        if self._pad:
            # sides as multiples of 32, which torch.export can follow; it cannot with "-width % 32"
            whole = [(side + _UNIT - 1) // _UNIT * _UNIT for side in (height, width)]
            x = F.pad(x, (0, whole[1] - width, 0, whole[0] - height))
        maps = {}
        for name, features in zip(self._out_features, self.body(x)):
            if self._channels_last:
                features = features.permute(0, 3, 1, 2)
            if self._pad:
                stride = self._out_feature_strides[name]
                for axis, side in (
                    (-2, height),
                    (-1, width),
                ):  # a slice's strides would tie a trace to its size
                    kept = torch.arange(-(-side // stride), device=x.device)
                    features = features.index_select(axis, kept)
            if name in self.output_norms:
                features = self.output_norms[name](features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps[name] = features
        return maps

    def renamed(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """``weights`` of a timm file under the names that they have in ``self``.

        timm joins the first two parts of a name where it takes a network apart (``stages.0`` becomes
        ``stages_0``), and puts others behind ``model.``.
        """
        own = self.body.state_dict().keys()
        result = {}
        for name, value in weights.items():
            forms = (name, name.replace(".", "_", 1), f"model.{name}")
            found = next((form for form in forms if form in own), name)
            if found in own or not found.endswith(".num_batches_tracked"):  # a frozen norm has no such count
                result[f"body.{found}"] = value
        return result


def timm_channels(
    *, name: str, out_features: Sequence[str] = STRIDES, options: Mapping[str, Any] | None = None
) -> list[int]:
    """Channels of ``TimmBackbone``'s maps, for the neck's config."""
    layout = _layout(name, options)
    return [layout.maps[stride].channels for stride in _wanted(layout, out_features)]


class _FrozenNorm(FrozenBatchNorm2d):
    """detectron2's, under the names of the batch norm that it replaces, with timm's activation behind it."""

    folded = False  # the convolution in front of it has it in its weights

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__(norm.num_features, norm.eps)
        state = norm.state_dict()
        for name in ("weight", "bias", "running_mean", "running_var"):
            if name in state:
                setattr(self, name, state[name].clone())
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x if self.folded else super().forward(x)))


class _FoldedConv2d(nn.Conv2d):
    """A convolution that applies the frozen norm behind it to its weights; both keep their names."""

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            cast(Any, conv.kernel_size),
            cast(Any, conv.stride),
            cast(Any, conv.padding),
            cast(Any, conv.dilation),
            conv.groups,
            bias=conv.bias is not None,
            device="meta",  # nothing is drawn or allocated: the next line replaces it
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.norms = (norm,)  # in a tuple: its buffers are registered where it stands

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = folded_norm(self.weight, self.bias, self.norms[0])
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _fold(body: nn.Module, conv: str, norm: str) -> None:
    first, second = body.get_submodule(conv), body.get_submodule(norm)
    if isinstance(second, _FrozenNorm):
        body.set_submodule(conv, _FoldedConv2d(cast(nn.Conv2d, first), second))
        second.folded = True


@dataclass(frozen=True)
class _Map:
    """One of the maps that timm's model offers: ``index`` in its list, parameters that it depends on."""

    index: int
    stride: int
    channels: int
    parameters: frozenset[str]


@dataclass(frozen=True)
class _Layout:
    """What is to be known of a model before its weights are allocated.

    Attributes:
        maps: by stride; of several with one stride the last.
        normed: names of convolutions and of the batch norms that take their output and nothing else.
        pad: it needs images of whole cells.
        mean, std: of the pixels in 0..1 that its weights were trained with.
    """

    name: str
    maps: dict[int, _Map]
    normed: list[tuple[str, str]]
    pad: bool
    channels_last: bool
    mean: Sequence[float]
    std: Sequence[float]


def _layout(name: str, options: Mapping[str, Any] | None) -> _Layout:
    return _inspected(name, json.dumps(dict(options or {}), sort_keys=True, default=str))


@functools.lru_cache(maxsize=32)
def _inspected(name: str, options: str) -> _Layout:
    """Built and run without memory, on torch's meta device."""
    with torch.device("meta"):
        model = _create(name, json.loads(options)).eval()
    info = model.feature_info
    normed = _record_normed(model)
    try:  # sides that no stride divides: a network whose maps are rounded up takes any size
        odd = [torch.Size(m.shape) for m in model(torch.empty(1, 3, _UNIT + 1, 2 * _UNIT + 1, device="meta"))]
    except Exception:  # timm's own assertions, torch's errors
        odd = []
    try:
        features = model(torch.empty(1, 3, 2 * _UNIT, 3 * _UNIT, device="meta"))
    except Exception as error:
        raise UserError(
            f"model.backbone.name={name} takes images of one size only ({str(error).splitlines()[0]}): take "
            "another, or see whether model.backbone.options has an argument against it "
            "(Swin: {strict_img_size: false})"
        ) from None
    strides, channels = list(info.reduction()), list(info.channels())
    channels_last = [m.shape[-1] for m in features] == channels != [m.shape[1] for m in features]
    sides = [tuple(m[1:3] if channels_last else m[2:4]) for m in odd]
    whole = [(-(-(_UNIT + 1) // stride), -(-(2 * _UNIT + 1) // stride)) for stride in strides]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    maps = {}
    for position, (stride, feature) in enumerate(zip(strides, features)):
        used = frozenset(names[id(parameter)] for parameter in _leaves(feature))
        maps[int(stride)] = _Map(info.out_indices[position], int(stride), channels[position], used)
    trained = _timm().get_pretrained_cfg(name)
    return _Layout(
        name=name,
        maps=maps,
        normed=list(normed.items()),
        pad=sides != whole,
        channels_last=channels_last,
        mean=trained.mean if trained else (0.485, 0.456, 0.406),
        std=trained.std if trained else (0.229, 0.224, 0.225),
    )


def _leaves(output: Tensor) -> list[Tensor]:
    """The parameters that ``output`` was computed from: the leaves of autograd's graph."""
    found, seen, nodes = [], set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes.extend(before for before, _ in node.next_functions)
    return found


def _record_normed(model: nn.Module) -> dict[str, str]:
    """The norm behind each convolution, filled when ``model`` is run; plain 2D convolutions alone."""
    normed: dict[str, str] = {}
    outputs: list[tuple[str, Tensor]] = []  # kept alive: an id is no one else's

    def after_conv(name: str, output: Tensor) -> None:
        outputs.append((name, output))

    def before_norm(name: str, x: Tensor) -> None:
        conv = next((conv for conv, output in outputs if output is x), None)
        if conv is not None:
            normed[conv] = name

    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            module.register_forward_hook(lambda m, args, output, name=name: after_conv(name, output))
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, args, name=name: before_norm(name, args[0]))
    return normed


def _wanted(layout: _Layout, out_features: Sequence[str]) -> list[int]:
    """The strides behind names such as "stride8"; a UserError for one that the model does not have."""
    strides = [
        int(f.removeprefix("stride")) if f.removeprefix("stride").isdigit() else f for f in out_features
    ]
    if missing := [s for s in strides if s not in layout.maps]:
        raise UserError(
            f"model.backbone.name={layout.name} has maps of strides {', '.join(map(str, layout.maps))} and "
            f"none of {', '.join(map(str, missing))}: take a network with stages, such as resnet18, "
            "mobilenetv4_conv_small or convnext_tiny"
        )
    return cast(list[int], strides)


def _frozen(layout: _Layout, freeze_at: int) -> frozenset[str]:
    if freeze_at <= 0:
        return frozenset()
    if (stride := 2**freeze_at) not in layout.maps:
        possible = [0, *(s.bit_length() - 1 for s in layout.maps)]
        raise UserError(
            f"model.backbone.freeze_at={freeze_at}: {layout.name} has no map of stride {stride}, whose "
            f"layers it would freeze; expected one of {', '.join(map(str, possible))}"
        )
    return layout.maps[stride].parameters


def _inside(body: nn.Module, part: str) -> list[str]:
    """Names of the parameters in the part of ``body`` that is named so."""
    names = [name for name, _ in body.named_parameters()]
    if found := [name for name in names if name.startswith(f"{part}.")]:
        return found
    first = listed(list(dict.fromkeys(name.split(".")[0] for name in names)))
    raise UserError(f"model.backbone.freeze: there is no part {part} with weights, but {first}")


def _create(name: str, options: Mapping[str, Any] | None, **arguments: Any) -> Any:
    timm = _timm()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"model.backbone.name={name}: timm {timm.__version__} has no such model. "
            + (f"Did you mean {', '.join(close)}?" if close else "timm.list_models() has them")
        )
    try:
        return timm.create_model(name, features_only=True, **arguments, **(options or {}))
    except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
        words = listed([line for line in str(error).splitlines() if line] or [type(error).__name__], 1)
        raise UserError(
            f"model.backbone.name={name} cannot be built by timm as a backbone: {words}"
        ) from None


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise UserError(
            "model.backbone.name is a model of timm, which is not installed: pip install timm"
        ) from None
    return timm
