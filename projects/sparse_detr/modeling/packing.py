"""Inference on the CPU: weights packed once, and what follows a product done while it is in the cache.

In torch every call of a linear layer or convolution brings its weights into the order that oneDNN
multiplies in, under autocast also into its dtype; activations and residuals are passes of their own over
memory. torch.compile with frozen weights avoids both by oneDNN's fused operators, after minutes of
compilation. Here they are called directly.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import Tensor, nn

from .backbone import FrozenNormConv2d, folded_norm
from .heads import ClassHead
from .layers import FFN

ROWS = 512  # of a feed-forward block, per thread and turn: their hidden values stay in the cache
FUSED = {nn.ReLU: ("relu", ""), nn.GELU: ("gelu", "none")}  # oneDNN's name and variant of an activation


def pack_weights(model: nn.Module) -> None:
    """Turn the layers of a model, in place, into packed ones, for a model that is not trained any more.

    Parameters, their names and the function stay, the latter to the rounding of the products. Packed
    weights are copies, made at the first call, in the dtype of that call (autocast's, if on). They follow
    parameters that an optimizer or a checkpoint changes, but not changes through ``.data``.

    In training, in tracing, on other devices and in dtypes other than float32 and bfloat16, layers run
    unpacked; where oneDNN's operators are not at hand, nothing is changed.
    """
    names = ("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise")
    if (
        platform.machine().lower() not in ("x86_64", "amd64")  # elsewhere oneDNN is another library
        or not torch.backends.mkldnn.is_available()
        or not all(hasattr(torch.ops.mkldnn, name) for name in names)
    ):
        return
    for module in reversed(list(model.modules())):  # parts first: a block needs packed convolutions
        if (packed := _packed_class(module)) is not None:
            module.__class__ = packed
        if isinstance(module, ResNet):
            for stage in module.stages:
                for block in stage[1:]:
                    block.owns_input = True  # nothing else reads what the block before it returned


def unpack_weights(model: nn.Module) -> None:
    """What ``pack_weights`` changed, as it was; for tools that look for torch's and detectron2's classes."""
    unpacked = {packed: plain for plain, packed in PACKED.items() if plain is not ClassHead}
    for module in model.modules():
        if type(module) in unpacked:
            module.__class__ = unpacked[type(module)]
            module.__dict__.pop("_packed", None)


def _packed_class(module: nn.Module) -> type[nn.Module] | None:
    if isinstance(module, FrozenNormConv2d) and module.activation not in (None, F.relu, F.relu_):
        return None
    if not isinstance(getattr(module, "conv1", None), PackedFrozenNormConv2d | None):
        return None
    return PACKED.get(type(module))


class _Packed(nn.Module):
    """A layer whose weights have packed copies, one per dtype, made anew when the weights change."""

    weight: Any
    bias: Any
    _packed: dict[torch.dtype, tuple]

    def packed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as oneDNN's operators take them."""
        copies = self.__dict__.setdefault("_packed", {})
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self.sources()]
        if dtype not in copies or copies[dtype][0] != versions:
            weight, bias = self.folded()
            weight = self.reorder(weight.detach().to(dtype))
            copies[dtype] = versions, weight, None if bias is None else bias.detach().to(dtype)
        return copies[dtype][1:]

    def sources(self) -> list[Tensor]:
        """The parameters and buffers that weight and bias are made of."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    def reorder(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict:
        """Copies and pickles pack for themselves: oneDNN's tensors can do neither."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _input(layer: nn.Module, x: Tensor) -> Tensor | None:
    """``x`` as oneDNN's operators take it; None: ``layer`` has to run unpacked."""
    if (
        layer.training
        or torch.is_grad_enabled()
        or x.device.type != "cpu"
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
    ):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return x.to(dtype) if dtype in (torch.float32, torch.bfloat16) and x.numel() else None


class PackedLinear(_Packed, nn.Linear):
    """A linear layer and the activation behind it."""

    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        """(..., C_in) -> (..., C_out); ``activation``: a key of ``FUSED``."""
        given = _input(self, x)
        if given is None:
            x = super().forward(x)
            return x if activation is None else activation(x)
        name, variant = ("none", "") if activation is None else FUSED[type(activation)]
        return torch.ops.mkldnn._linear_pointwise(given, *self.packed(given.dtype), name, [], variant)

    def reorder(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight)


class PackedFFN(FFN):
    """A feed-forward block, some tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        given = _input(self, x)
        if given is None:
            return super().forward(x)
        rows = given.flatten(0, -2).split(ROWS * torch.get_num_threads())
        return torch.cat([self._refreshed(some) for some in rows]).view_as(x)

    def _refreshed(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(self.linear1(x, self.activation)))


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution with the ReLU and, before it, the residual that may follow."""

    activation: Any = None  # detectron2's convolutions may have one of their own

    def forward(self, x: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), channels last where ``x`` is. Writes into ``residual``."""
        given = _input(self, x)
        if given is None or isinstance(self.padding, str) or self.padding_mode != "zeros":
            x = super().forward(x)
            x = x if residual is None else x + residual
            return F.relu_(x) if relu and self.activation is None else x
        arguments = *self.packed(given.dtype), self.padding, self.stride, self.dilation, self.groups
        name = "relu" if relu or self.activation is not None else "none"
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(given, *arguments, name, [], "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual.to(given.dtype), given, *arguments, "add", 1.0, name, [], ""
        )

    def reorder(self, weight: Tensor) -> Tensor:
        # oneDNN's own order depends on the size of the image, and the wrong one is slow.
        return weight.contiguous(memory_format=torch.channels_last)


class PackedFrozenNormConv2d(PackedConv2d, FrozenNormConv2d):
    """The same with a frozen norm, which was folded once."""

    def sources(self) -> list[Tensor]:
        norm: Any = self.norm
        return [*super().sources(), norm.weight, norm.bias, norm.running_mean, norm.running_var]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        return folded_norm(self.weight, self.bias, self.norm)


class PackedStem(BasicStem):
    """detectron2's, with the ReLU in the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv1(x, relu=True), kernel_size=3, stride=2, padding=1)


def _residual(block: BasicBlock | BottleneckBlock, x: Tensor) -> Tensor:
    """What the block adds, in memory that can be written."""
    if block.shortcut is not None:
        return block.shortcut(x)
    return x if block.owns_input else x.clone()


class PackedBasicBlock(BasicBlock):
    """detectron2's, with activations and residual in the convolutions."""

    owns_input = False  # and may write into it

    def forward(self, x: Tensor) -> Tensor:
        residual = _residual(self, x)
        return self.conv2(self.conv1(x, relu=True), relu=True, residual=residual)


class PackedBottleneckBlock(BottleneckBlock):
    """detectron2's, with activations and residual in the convolutions."""

    owns_input = False

    def forward(self, x: Tensor) -> Tensor:
        residual = _residual(self, x)
        x = self.conv2(self.conv1(x, relu=True), relu=True)
        return self.conv3(x, relu=True, residual=residual)


PACKED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PackedLinear,
    ClassHead: PackedLinear,
    FFN: PackedFFN,
    nn.Conv2d: PackedConv2d,
    FrozenNormConv2d: PackedFrozenNormConv2d,
    BasicStem: PackedStem,
    BasicBlock: PackedBasicBlock,
    BottleneckBlock: PackedBottleneckBlock,
}
