"""Small layers that every model shares: MLP, FFN, sine codes, inverse sigmoid, neck."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Module = TypeVar("Module", bound=nn.Module)

if TYPE_CHECKING:

    class ModuleList(nn.ModuleList, Generic[Module]):
        """``nn.ModuleList``, for which type checkers know what it holds."""

        def __init__(self, modules: Iterable[Module]): ...
        @overload
        def __getitem__(self, idx: slice) -> ModuleList[Module]: ...
        @overload
        def __getitem__(self, idx: int) -> Module: ...
        def __getitem__(self, idx): ...
        def __iter__(self) -> Iterator[Module]: ...

else:
    ModuleList = nn.ModuleList


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with both terms kept above ``eps``; ``x`` outside [0, 1] is clamped.

    ``eps`` is part of a model's function: 1e-5 in Deformable DETR, 1e-3 in DINO.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is half or bfloat16: coordinates and losses need the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def tensor_like(values: float | Sequence, like: Tensor) -> Tensor:
    """Numbers in the dtype and on the device of ``like``, without the wait of ``like.new_tensor``."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def sine_code(x: Tensor, num_feats: int, temperature: float, interleaved: bool = True) -> Tensor:
    """Sines and cosines of an angle at ``num_feats / 2`` frequencies, interleaved or all sines first.

    Attention Is All You Need, Sec. 3.5. (...,) angles in radians -> (..., num_feats).
    """
    index = torch.arange(0, num_feats, 2, dtype=x.dtype, device=x.device)
    angle = x[..., None] / temperature ** (index / num_feats)  # (..., num_feats / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1 if interleaved else -2).flatten(-2)


def box_code(boxes: Tensor, num_feats: int, order: Sequence[int] = (0, 1, 2, 3)) -> Tensor:
    """Sine code of each coordinate, concatenated in ``order``.

    Args:
        boxes: (..., 4) cxcywh or (..., 2) in [0, 1].

    Returns:
        (..., len(order) * num_feats).
    """
    codes = sine_code(boxes * (2 * math.pi), num_feats, temperature=10000.0)  # (..., 4, num_feats)
    return torch.cat([codes[..., i, :] for i in order], dim=-1)


class SinePosition(nn.Module):
    """Sine code of a cell's row and column, normalised to the part that shows the image.

    Rows are counted from 1, ``y <- (y + offset) / (height + 1e-6) * 2 pi`` with the image's height in
    cells; columns likewise. Deformable DETR and DINO's 12-epoch recipe use temperature 10000 and offset -0.5;
    the official DINO uses 20 and 0.

    Args:
        normalize: False codes ``y + offset`` itself, in cells: RT-DETR, with offset -1.
        interleaved: see ``sine_code``; False in RT-DETR.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        temperature: float = 10000.0,
        offset: float = -0.5,
        normalize: bool = True,
        interleaved: bool = True,
    ):
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"SinePosition: embed_dim={embed_dim} must be a multiple of 4")
        self.num_feats = embed_dim // 2
        self.temperature = temperature
        self.offset = offset
        self.normalize = normalize
        self.interleaved = interleaved

    def forward(self, mask: Tensor, extent: Tensor) -> Tensor:
        """(B, H, W) bool, True on padding -> (B, H * W, embed_dim): y code, then x code.

        Args:
            extent: (B, 2) size (w, h) of the image in cells.

        Padding is at the right and bottom, so rows and columns are coded once each. Padded cells
        get the code of the last row or column; nothing reads them.
        """
        height, width = mask.shape[1:]
        y = self._code(mask[:, :, 0], extent[:, 1:])[:, :, None].expand(-1, -1, width, -1)
        x = self._code(mask[:, 0, :], extent[:, :1])[:, None].expand(-1, height, -1, -1)
        return torch.cat([y, x], dim=-1).flatten(1, 2)  # (B, H * W, embed_dim)

    def _code(self, mask: Tensor, length: Tensor) -> Tensor:
        count = (~mask).cumsum(1).to(length.dtype)  # (B, n)
        angle = count + self.offset
        if self.normalize:
            angle = angle / (length + 1e-6) * (2 * math.pi)
        return sine_code(angle, self.num_feats, self.temperature, self.interleaved)

    def extra_repr(self) -> str:
        return f"num_feats={self.num_feats}, temperature={self.temperature}, offset={self.offset}"


class TransformerLayer(nn.Module):
    """A layer whose activations can be computed again instead of being kept (Chen et al., 2016).

    With ``activation_checkpointing``, training keeps the layer's inputs only; its backward pass
    repeats the forward pass, with the same dropout, and gives the same gradients.
    """

    activation_checkpointing = False

    def __call__(self, *args, **kwargs):
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)


def clone_layers(layer: Module, num_layers: int) -> ModuleList[Module]:
    """``num_layers`` independent copies; the transformer draws their initial weights."""
    return ModuleList(copy.deepcopy(layer) for _ in range(num_layers))


class MLP(nn.Module):
    """``num_layers`` linear layers with ReLU between them."""

    def __init__(self, *, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        dims = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FFN(nn.Module):
    """LayerNorm(x + W2 relu(W1 x)): the post-norm feed-forward block of a transformer layer.

    ``activation``: "relu", or "gelu".
    """

    def __init__(self, *, embed_dim: int, ffn_dim: int, dropout: float = 0.0, activation: str = "relu"):
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.activation = {"relu": nn.ReLU(inplace=True), "gelu": nn.GELU()}[activation]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))


class ChannelMapper(nn.Module):
    """Backbone maps to ``num_levels`` maps of ``embed_dim`` channels, each with a norm.

    Deformable DETR, App. A.4 (Fig. 4): 1x1 convolutions on the backbone maps; the first extra
    level is a 3x3 stride-2 convolution of the *last backbone map*, further ones of the extra level
    before.

    Args:
        num_groups: of the GroupNorm.
        bias: of the convolutions.
        norm: "GN", or RT-DETR's "BN"; "SyncBN" takes the statistics over all GPUs.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        embed_dim: int,
        num_levels: int,
        num_groups: int = 32,
        bias: bool = True,
        norm: str = "GN",
    ):
        super().__init__()
        if num_levels < len(in_channels):
            raise ValueError(
                f"ChannelMapper: num_levels={num_levels} is fewer than the {len(in_channels)} "
                "backbone maps; take fewer backbone out_features"
            )
        convs = [nn.Conv2d(channels, embed_dim, 1, bias=bias) for channels in in_channels]
        channels = in_channels[-1]
        for _ in range(num_levels - len(in_channels)):
            convs.append(nn.Conv2d(channels, embed_dim, 3, stride=2, padding=1, bias=bias))
            channels = embed_dim
        self.num_inputs = len(in_channels)
        self.convs = ModuleList(convs)
        norms = {
            "GN": lambda: nn.GroupNorm(num_groups, embed_dim),
            "BN": lambda: nn.BatchNorm2d(embed_dim),
            "SyncBN": lambda: nn.SyncBatchNorm(embed_dim),
        }
        self.norms = ModuleList(norms[norm]() for _ in convs)
        for conv in self.convs:
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[(B, C_i, H_i, W_i)] -> [(B, embed_dim, H_l, W_l)], one per level."""
        assert len(maps) == self.num_inputs, f"{len(maps)} maps, expected {self.num_inputs}"
        levels: list[Tensor] = []
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            if level < self.num_inputs:
                source = maps[level]
            elif level == self.num_inputs:
                source = maps[-1]
            else:
                source = levels[-1]
            levels.append(norm(conv(source)))
        return levels
