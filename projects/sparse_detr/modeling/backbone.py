"""detectron2's ResNet and Swin as the published detectors use them.

The plain ResNets need nothing from here (see ``configs/models``); what is added is the dilated last
stage (DC5), ResNet-D, a Swin Transformer that needs no ``timm``, torchvision's Swin and ConvNeXt, and
frozen norms at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.backbone.swin import SwinTransformer
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torchvision.ops import StochasticDepth


class FrozenNormConv2d(Conv2d):
    """A convolution that applies its frozen norm to the weights instead of the feature map.

    Parameters, buffers and their names are those of ``Conv2d(norm=FrozenBatchNorm2d)``, gradients
    too; the passes over the map that the norm would take are saved.

    Args:
        conv: the convolution whose weights, norm and activation this one takes over.
    """

    def __init__(self, conv: Conv2d):
        shape = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
        super().__init__(
            *shape,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",  # nothing is drawn or allocated: the next line replaces it
            norm=conv.norm,
            activation=conv.activation,
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.training = conv.training

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = folded_norm(self.weight, self.bias, self.norm)
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def folded_norm(weight: Tensor, bias: Tensor | None, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in, k, k) and bias (C_out,) of a convolution with the norm behind it in them."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (C_out,)
    shift = norm.bias - norm.running_mean * scale
    return weight * scale[:, None, None, None], shift if bias is None else shift + bias * scale


def fold_frozen_norms(module: nn.Module) -> None:
    """Replace every detectron2 convolution with a ``FrozenBatchNorm2d`` inside ``module``."""
    for name, part in module.named_children():
        if type(part) is Conv2d and isinstance(part.norm, FrozenBatchNorm2d):
            setattr(module, name, FrozenNormConv2d(part))
        else:
            fold_frozen_norms(part)


def build_swin(
    *,
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int = 7,
    drop_path_rate: float = 0.2,
    out_indices: Sequence[int] = (1, 2, 3),
    frozen_stages: int = -1,
    pretrain_img_size: int = 224,
    use_checkpoint: bool = False,
) -> SwinTransformer:
    """Swin Transformer (Liu et al., ICCV 2021) with stochastic depth from torchvision.

    Outputs ``p{i}`` for i in ``out_indices``, strides 4, 8, 16, 32; images of any size.
    ``frozen_stages=2`` freezes the patch embedding and the first stage.
    """
    swin = SwinTransformer(
        embed_dim=embed_dim,
        depths=list(depths),
        num_heads=list(num_heads),
        window_size=window_size,
        drop_path_rate=0.0,
        out_indices=tuple(out_indices),
        frozen_stages=frozen_stages,
        pretrain_img_size=pretrain_img_size,
        use_checkpoint=use_checkpoint,
    )
    # detectron2 would import timm for a rate above 0.
    blocks = [block for layer in swin.layers for block in layer.blocks]
    for block, rate in zip(blocks, torch.linspace(0, drop_path_rate, len(blocks)).tolist()):
        block.drop_path = StochasticDepth(rate, mode="row")
    return swin


class StagedBackbone(Backbone):
    """A Swin Transformer or ConvNeXt of torchvision, whose ``features`` alternate steps down and stages.

    Outputs ``p{i}`` for i in ``out_indices``, strides 4, 8, 16, 32, without norms; images of any size.

    Args:
        model: its ``features`` are taken, its classifier is not.
        channels: of the four stages.
        channels_last: the stages' outputs are (B, H, W, C).
        frozen_stages: how many stages do not train, the first with the stem, and each with the step down
            behind it.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        channels: Sequence[int],
        channels_last: bool = False,
        out_indices: Sequence[int] = (1, 2, 3),
        frozen_stages: int = 1,
    ):
        super().__init__()
        self.features = cast(nn.Sequential, model.features)
        self.channels_last = channels_last
        self.out_indices = tuple(out_indices)
        for part in self.features[: 2 * frozen_stages + (frozen_stages > 0)]:
            part.requires_grad_(False)
        names = [f"p{index}" for index in out_indices]
        self._out_features = names
        self._out_feature_strides = {name: 4 * 2**i for name, i in zip(names, out_indices)}
        self._out_feature_channels = {name: channels[i] for name, i in zip(names, out_indices)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps (B, C_i, H_i, W_i) by name."""
        outputs = {}
        for index in range(2 * max(self.out_indices) + 2):
            x = self.features[index](x)
            if index % 2 and index // 2 in self.out_indices:
                outputs[f"p{index // 2}"] = x.permute(0, 3, 1, 2) if self.channels_last else x
        return outputs


def build_dilated_resnet(
    *, depth: int = 50, freeze_at: int = 2, out_features: Sequence[str] = ("res5",)
) -> ResNet:
    """ResNet with frozen norms whose last stage has stride 1 and dilation 2 (DC5): stride 16.

    The first block of the stage keeps dilation 1, as in torchvision's
    ``replace_stride_with_dilation``, which the published models use.
    """
    stages = ResNet.make_default_stages(depth, stride_in_1x1=False, norm="FrozenBN")
    stages[-1] = ResNet.make_stage(
        BottleneckBlock,
        len(stages[-1]),
        in_channels=1024,
        out_channels=2048,
        bottleneck_channels=512,
        stride_per_block=[1] * len(stages[-1]),
        dilation_per_block=[1] + [2] * (len(stages[-1]) - 1),
        stride_in_1x1=False,
        norm="FrozenBN",
    )
    stem = BasicStem(in_channels=3, out_channels=64, norm="FrozenBN")
    return ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions, the first with stride 2, and a max pooling: ResNet-D's stem, stride 4."""

    def __init__(self, *, in_channels: int = 3, out_channels: int = 64, norm: str = "FrozenBN"):
        super().__init__(in_channels, out_channels, 4)
        half = out_channels // 2
        self.conv1 = _conv_norm_relu(in_channels, half, norm, stride=2)
        self.conv2 = _conv_norm_relu(half, half, norm)
        self.conv3 = _conv_norm_relu(half, out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.conv2(self.conv1(x)))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def _conv_norm_relu(in_channels: int, channels: int, norm: str, stride: int = 1) -> Conv2d:
    shape = in_channels, channels, 3, stride, 1
    conv = Conv2d(*shape, bias=False, norm=get_norm(norm, channels), activation=F.relu_)
    c2_msra_fill(conv)
    return conv


def build_resnet_d(
    *,
    depth: int = 50,
    norm: str = "FrozenBN",
    freeze_at: int = 0,
    out_features: Sequence[str] = ("res3", "res4", "res5"),
) -> ResNet:
    """ResNet-D (He et al., "Bag of Tricks", CVPR 2019, Sec. 4.1), RT-DETR's and PaddlePaddle's "vd".

    A deep stem, and shortcuts that average before a 1x1 convolution instead of striding; the first block
    of every stage has such a convolution, also where its channels stay the same.

    Args:
        depth: 18, 34, 50 or 101.
        freeze_at: see detectron2's ``ResNet``; 1 freezes the stem.
    """
    options = {"stride_in_1x1": False} if depth >= 50 else {}
    stages = ResNet.make_default_stages(depth, norm=norm, **options)
    for first, *_ in stages:
        shape = first.in_channels, first.out_channels, 1
        conv = Conv2d(*shape, bias=False, norm=get_norm(norm, first.out_channels))
        c2_msra_fill(conv)
        pool = nn.AvgPool2d(2, ceil_mode=True)
        first.shortcut = conv if first.stride == 1 else nn.Sequential(pool, conv)
    return ResNet(DeepStem(norm=norm), stages, out_features=list(out_features), freeze_at=freeze_at)
