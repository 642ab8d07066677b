"""Convolutions between the levels of the encoder's memory: top-down, then bottom-up.

A path aggregation network (Liu et al., CVPR 2018) of cross-stage partial layers (CSPNet, Wang et al.,
2020) whose blocks are RepVGG's (Ding et al., CVPR 2021): the cross-scale fusion of RT-DETR (Zhao et al.,
CVPR 2024, Sec. 4.2). Salience DETR's neck "RepVGGPluX" (Hou et al., CVPR 2024) gives the blocks a residual
and a global context (GCNet, Cao et al., 2019). It lets tokens that an encoder did not refresh learn from
those that it did; any model may have it.

In evaluation every norm is folded into its convolution, and the two branches of a block into one: the
same function (RepVGG, Sec. 3.3; the published code computes both branches). Names of parts are those of
the published files.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn

from .layers import ModuleList
from .tokens import Tokens, flatten_levels


class ConvNorm(nn.Sequential):
    """A convolution without bias and a batch norm; half a kernel of padding.

    A single cell has no statistics: also in training, it is normalised with the running ones.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, norm: str = "BN"
    ):
        conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, get_norm(norm, channels))

    @property
    def conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self[0])

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that does the same with the norm's running statistics."""
        conv, norm = self.conv, cast(nn.BatchNorm2d, self[1])
        assert norm.running_var is not None and norm.running_mean is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            found = self.conv(x)
            if found[:, :1].numel() > 1:
                return self[1](found)
        weight, bias = self.folded()
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding, groups=self.conv.groups)


class GlobalContext(nn.Module):
    """Scales channels by what an attention over all positions finds (GCNet, Sec. 3.3).

    The attention logit's bias has no effect, and no gradient: softmax cancels it.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.conv_mask = nn.Conv2d(channels, 1, 1)
        self.se_module = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, C, H, W) -> same; ``mask`` (B, 1, H, W) bool, True on cells to leave out, or None."""
        logits = self.conv_mask(x)
        if mask is not None:
            logits = logits.masked_fill(mask, float("-inf"))
        attention = logits.flatten(2).softmax(-1)  # (B, 1, H * W)
        context = x.flatten(2) @ attention.mT  # (B, C, 1)
        return x * self.se_module(context[..., None]).sigmoid()


class FusionBlock(nn.Module):
    """x + context(SiLU(3x3 branch + 1x1 branch)), both branches grouped; without ``context``, SiLU(...)."""

    def __init__(self, channels: int, groups: int, norm: str, context: bool = True):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, groups=groups, norm=norm)
        self.conv2 = ConvNorm(channels, channels, 1, groups=groups, norm=norm)
        self.se_module = GlobalContext(channels) if context else None

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one 3x3 convolution that does what both branches do."""
        (weight, bias), (point, point_bias) = self.conv1.folded(), self.conv2.folded()
        return weight + F.pad(point, (1, 1, 1, 1)), bias + point_bias

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = without_padding(x, mask)
        if self.training:
            mixed = self.conv1(x) + self.conv2(x)
        else:
            weight, bias = self.folded()
            mixed = F.conv2d(x, weight, bias, padding=1, groups=self.conv1.conv.groups)
        mixed = F.silu(mixed)
        return mixed if self.se_module is None else self.se_module(mixed, mask) + x


class FusionLayer(nn.Module):
    """(B, 2C, H, W) -> (B, C, H, W): half through three blocks, half past them (cross-stage partial).

    ``hidden`` channels inside; where they are not C, a last convolution leads back.
    """

    def __init__(self, channels: int, hidden: int, groups: int, norm: str, context: bool):
        super().__init__()
        self.conv1 = ConvNorm(2 * channels, hidden, 1, norm=norm)
        self.conv2 = ConvNorm(2 * channels, hidden, 1, norm=norm)
        self.bottlenecks = ModuleList(FusionBlock(hidden, groups, norm, context) for _ in range(3))
        self.conv3 = ConvNorm(hidden, channels, 1, norm=norm) if hidden != channels else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        through = F.silu(self.conv1(x))
        for block in self.bottlenecks:
            through = block(through, mask)
        fused = through + F.silu(self.conv2(x))
        return fused if self.conv3 is None else F.silu(self.conv3(fused))


class FusionNeck(nn.Module):
    """All tokens in, all tokens out; every level has seen all others.

    Args:
        groups: of the blocks' convolutions.
        context: blocks with a residual and a global context (Salience DETR), or plain ones (RT-DETR).
        expansion: channels inside a layer, as a share of ``embed_dim``.
        project: a last 1x1 convolution with norm for each level.
        output_dim: channels that it leads to; None: ``embed_dim``.
        norm: detectron2's name of the batch norm; "SyncBN" takes the statistics over all GPUs.
        mask_padding: padded cells are zero wherever a convolution reads them, and no part of a context:
            an image's result in evaluation does not depend on its batch. False convolves over whatever
            the encoder left there, as published. Statistics in training count padded cells either way.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_levels: int = 4,
        groups: int = 4,
        context: bool = True,
        expansion: float = 1.0,
        project: bool = False,
        output_dim: int | None = None,
        norm: str = "BN",
        mask_padding: bool = False,
    ):
        super().__init__()
        if output_dim not in (None, embed_dim) and not project:
            raise ValueError(
                f"FusionNeck: output_dim={output_dim} needs project=True: its last convolutions lead there "
                f"from embed_dim={embed_dim}"
            )
        self.mask_padding = mask_padding
        steps = range(num_levels - 1)  # i: between the levels i and i + 1
        layer = embed_dim, int(embed_dim * expansion), groups, norm, context
        self.lateral_convs = ModuleList(ConvNorm(embed_dim, embed_dim, 1, norm=norm) for _ in steps)
        self.layer_blocks = ModuleList(FusionLayer(*layer) for _ in steps)
        self.downsample_blocks = ModuleList(
            ConvNorm(embed_dim, embed_dim, 3, stride=2, norm=norm) for _ in steps
        )
        self.pan_blocks = ModuleList(FusionLayer(*layer) for _ in steps)
        self.output_convs = ModuleList(
            ConvNorm(embed_dim, output_dim or embed_dim, 1, norm=norm)
            for _ in range(num_levels if project else 0)
        )
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, memory: Tensor, tokens: Tokens) -> Tensor:
        """(B, N, C) -> (B, N, output_dim or C)."""
        maps = [
            level.mT.unflatten(2, shape) for level, shape in zip(tokens.split_levels(memory), tokens.shapes)
        ]
        masks: list[Tensor | None] = [None] * len(maps)
        if self.mask_padding and tokens.has_padding:
            masks = [
                mask.unflatten(1, shape)[:, None]
                for mask, shape in zip(tokens.split_levels(tokens.mask), tokens.shapes)
            ]
        return flatten_levels(self.fuse(maps, masks))

    def fuse(self, maps: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
        """Maps (B, C, H_l, W_l) and masks (B, 1, H_l, W_l), True on padding, finest level first."""
        maps = list(maps)
        steps = range(len(maps) - 1)
        for i in reversed(steps):
            maps[i + 1] = F.silu(self.lateral_convs[i](maps[i + 1]))
            up = F.interpolate(maps[i + 1], maps[i].shape[-2:], mode="nearest")
            maps[i] = self.layer_blocks[i](torch.cat([up, maps[i]], dim=1), masks[i])
        for i in steps:
            down = F.silu(self.downsample_blocks[i](without_padding(maps[i], masks[i])))
            maps[i + 1] = self.pan_blocks[i](torch.cat([down, maps[i + 1]], dim=1), masks[i + 1])
        for i, conv in enumerate(self.output_convs):
            maps[i] = conv(maps[i])
        return maps


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (B, C, H, W), zero where ``mask`` (B, 1, H, W), if any, is True."""
    return x if mask is None else x.masked_fill(mask, 0.0)
