"""How much a detector computes and holds: multiply-adds and parameters, module by module.

Counts are those of fvcore, the tool behind the papers' GFLOPs, where a multiply-add is one "FLOP".
The model is traced in one inference pass on a blank image.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from detectron2.structures import ImageList
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from tabulate import tabulate
from torch import Tensor, nn

from .errors import UserError
from .kernels import fvcore_handles
from .modeling import ImageBudgets, SetDetector

COUNTED = (
    "Counted, one per multiply-add: convolutions, linear layers, matrix products (also inside "
    "attention); 4 per bilinear sample and channel in deformable attention, where key-aware attention "
    "samples keys and values, and multiplies both; 5 per element of layer "
    "and group norms; 1 per element of resized masks. Not counted: batch norms (they fold into "
    "convolutions), softmax, top-k, gather and scatter, everything elementwise."
)


@dataclass(frozen=True)
class ModuleCost:
    """One module with everything inside it; a parameter and an operation belong to one module.

    macs: multiply-adds of one inference pass.
    """

    name: str
    parameters: int
    trainable: int
    macs: int


@dataclass(frozen=True)
class Analysis:
    """Costs of a detector for one image of ``size`` (height, width); ``modules[0]`` is the whole.

    operators: multiply-adds by kind of operation.
    uncounted: calls of operations that are not counted, by kind.
    """

    size: tuple[int, int]
    modules: list[ModuleCost]
    operators: dict[str, int]
    uncounted: dict[str, int]

    @property
    def total(self) -> ModuleCost:
        return self.modules[0]

    def __getitem__(self, name: str) -> ModuleCost:
        """The module of that name, as in ``model.named_modules()``; "" is the whole model."""
        return next(m for m in self.modules if m.name == name)

    def table(self, depth: int = 2) -> str:
        """Modules down to ``depth`` names, those without parameters and operations left out."""
        rows = [
            (
                "  " * _depth(m.name) + (m.name or "total"),
                f"{m.parameters / 1e6:.3f}",
                f"{m.trainable / 1e6:.3f}",
                f"{m.macs / 1e9:.3f}",
            )
            for m in self.modules
            if _depth(m.name) <= depth and (m.parameters or m.macs)
        ]
        return tabulate(
            rows,
            ["module", "parameters (M)", "trainable (M)", "GMACs"],
            "simple",
            colalign=("left", "right", "right", "right"),
            disable_numparse=True,
            preserve_whitespace=True,
        )

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "size": list(self.size),
            "counted": COUNTED,
            "total": asdict(self.total),
            "modules": [asdict(m) for m in self.modules],
            "operators": self.operators,
            "uncounted": self.uncounted,
        }


def analyze(model: SetDetector, size: tuple[int, int]) -> Analysis:
    """Count parameters and the multiply-adds of one image without padding.

    Where each image has a token budget of its own (``ImageBudgets``), it is an image with the mean.

    Args:
        model: on any device and in any mode; it is not changed.
        size: height and width of the network's input in pixels.
    """
    height, width = size
    if min(size) < 1:
        raise UserError(f"size={height}x{width} must be positive")
    traced = copy.deepcopy(model).eval()
    encoder: Any = traced.transformer.encoder
    if isinstance(ratio := getattr(encoder, "keep_ratio", None), ImageBudgets):
        encoder.keep_ratio = float(ratio)
    image = torch.zeros(3, height, width, device=model.device)
    counts = FlopCountAnalysis(_Detect(traced), (image,)).set_op_handle(**_HANDLES)
    counts = counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about Python numbers
        by_module, operators = counts.by_module(), counts.by_operator()
        uncounted = counts.unsupported_ops()
    modules = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        modules.append(
            ModuleCost(
                name=name,
                parameters=sum(p.numel() for p in parameters),
                trainable=sum(p.numel() for p in parameters if p.requires_grad),
                macs=int(by_module[f"model.{name}" if name else ""]),
            )
        )
    return Analysis(
        size=(height, width),
        modules=modules,
        operators={k: int(v) for k, v in operators.most_common() if v},
        uncounted=dict(sorted(uncounted.items())),
    )


class _Detect(nn.Module):
    """A detector as a function of one normalised image, as the tracer wants it."""

    def __init__(self, model: SetDetector):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        size = (int(image.shape[1]), int(image.shape[2]))
        output = self.model.detect(ImageList(image[None], [size]))
        return output.logits, output.boxes


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _dot_product_attention(inputs: Sequence, outputs: Sequence) -> int:
    """Two matrix products: (..., Q, D) x (..., K, D) and (..., Q, K) x (..., K, D)."""
    return 2 * prod(get_shape(inputs[0])) * get_shape(inputs[1])[-2]


_HANDLES = {
    "aten::batch_norm": lambda inputs, outputs: 0,
    "aten::scaled_dot_product_attention": _dot_product_attention,
    **fvcore_handles(),
}
