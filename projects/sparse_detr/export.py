"""A detector as a function of one image tensor: for torch.compile, torch.export and ONNX.

Input: ``image`` (1, 3, H, W) float, 0 to 255, channels in the model's ``input_format`` (RGB unless
its config says otherwise), resized by the caller. Normalisation is part of the model.

Output: ``scores`` (1, K) descending, ``labels`` (1, K) int64 from 0, and ``boxes`` (1, K, 4) xyxy in
pixels of ``image``, clipped to it; K is ``max_detections``, fewer on images with few tokens.

H and W stay free in all three unless a fixed size is asked for. torch.export and torch.compile keep
deformable attention as one op; ONNX gets its plain PyTorch form, which is made of standard operators.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.structures import ImageList
from torch import Tensor, nn

from . import kernels
from .errors import UserError
from .modeling import SetDetector
from .modeling.postprocess import top_detections

logger = logging.getLogger(__name__)

OUTPUTS = ("scores", "labels", "boxes")


class TensorDetector(nn.Module):
    """``detector``, switched to evaluation mode, from tensor to tensors; see the module's top."""

    def __init__(self, detector: SetDetector):
        super().__init__()
        self.detector = detector
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[-2:]
        model = self.detector
        normalised = (image.to(model.pixel_mean.dtype) - model.pixel_mean) / model.pixel_std
        found = model.detect(ImageList(normalised, [(height, width)] * image.shape[0]))
        scores, labels, boxes = top_detections(found.logits, found.boxes, model.max_detections)
        limit = torch.tensor([width, height] * 2, dtype=boxes.dtype, device=boxes.device)
        return scores, labels, torch.minimum((boxes * limit).clamp(min=0), limit)


def export_program(
    detector: SetDetector, size: tuple[int, int] = (480, 640), *, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """``torch.export`` of a ``TensorDetector``.

    Args:
        size: (height, width) of the image it is traced with.
        dynamic: leave height and width free; otherwise only ``size`` can be run.

    Raises:
        ValueError: the model cannot be traced with free height and width, or not with this ``size``.
    """
    module, image = TensorDetector(detector), _example(detector, size)
    free = {"image": {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    with torch.no_grad(), _explained(detector, size, dynamic):
        return torch.export.export(module, (image,), dynamic_shapes=free if dynamic else None, strict=False)


def export_onnx(
    detector: SetDetector,
    path: str,
    size: tuple[int, int] = (480, 640),
    *,
    dynamic: bool = True,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a ``TensorDetector`` as an ONNX file with the input ``image`` and the outputs
    ``scores``, ``labels`` and ``boxes``.

    Args:
        path: the file; weights that exceed ONNX's 2 GB go beside it.
        size, dynamic: see ``export_program``.
        metadata: written to the file's metadata as JSON, beside ``input_format``.

    Raises:
        ValueError: onnx or onnxscript is missing, or as ``export_program``.
    """
    _require("onnx", "onnxscript")
    module, image = TensorDetector(detector), _example(detector, size)
    free = {"image": {2: "height", 3: "width"}}
    with torch.no_grad(), kernels.implementation("reference"), _explained(detector, size, dynamic):
        program = torch.onnx.export(
            module,
            (image,),
            dynamo=True,
            dynamic_shapes=free if dynamic else None,
            input_names=["image"],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    assert program is not None  # it is with dynamo=True
    for key, value in {"input_format": detector.input_format, **(metadata or {})}.items():
        program.model.metadata_props[key] = json.dumps(value)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    program.save(path)


def compare_onnx(
    detector: SetDetector, path: str, sizes: Sequence[tuple[int, int]], seed: int = 0
) -> dict[tuple[int, int], tuple[float, float]]:
    """Run an exported file in onnxruntime and the detector in PyTorch on the same random images.

    Detections are compared with the nearest one of their class, not by rank: onnxruntime's sigmoid
    is rounded to 1e-7, and equal scores may come in any order.

    Returns:
        Per (height, width) the largest difference in score and, in pixels, of a box coordinate.

    Raises:
        ValueError: onnxruntime is missing.
    """
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    module = TensorDetector(detector)
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    for height, width in sizes:
        image = torch.rand(1, 3, height, width, generator=generator) * 255
        with torch.no_grad():
            expected = [x[0].cpu() for x in module(image.to(detector.device))]
        found = session.run(list(OUTPUTS), {"image": image.numpy()})
        errors[height, width] = _difference([torch.from_numpy(x[0]) for x in found], expected)
    return errors


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Of two sets of (scores (K,), labels (K,), boxes (K, 4)): the largest of score and box."""
    if found[0].shape != expected[0].shape:
        return math.inf, math.inf
    (scores, labels, boxes), (true_scores, true_labels, true_boxes) = found, expected
    apart = (true_boxes[:, None] - boxes).abs().amax(-1)  # (K, K), expected by found
    apart = apart.masked_fill(true_labels[:, None] != labels, math.inf)
    nearest, index = apart.min(1)
    return float((true_scores - scores[index]).abs().max()), float(nearest.max())


def _example(detector: SetDetector, size: tuple[int, int]) -> Tensor:
    return torch.zeros(1, 3, *size, device=detector.device)


def _require(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"{package} is not installed: pip install onnx onnxscript onnxruntime") from error


@contextmanager
def _explained(detector: SetDetector, size: tuple[int, int], dynamic: bool) -> Iterator[None]:
    """Why a model cannot be traced with free sizes, as one sentence with the way out."""
    if dynamic and isinstance(detector.backbone, SwinTransformer):
        # A trace would pass, and be wrong on other sizes without a word from onnxruntime.
        raise UserError(_refusal(detector, size, "its number of windows is computed in Python"))
    stride = _coarsest_stride(detector)
    if dynamic and min(size) <= stride:
        # A level one token high or wide stays so in the trace: it fails, or is wrong, on other sizes.
        raise UserError(
            f"size={size[0]}x{size[1]}: to leave height and width free, trace with both above {stride}, "
            "the stride of the coarsest level"
        )
    try:
        yield
    except Exception as error:  # the tracers' own types are private and change with torch
        if not dynamic:
            raise
        logger.debug("tracing with free sizes failed", exc_info=True)
        reason = next((x for x in str(error).splitlines() if x.strip()), type(error).__name__)
        raise UserError(_refusal(detector, size, reason[:200])) from error


def _coarsest_stride(detector: SetDetector) -> int:
    neck = detector.neck
    stride = detector.backbone.output_shape()[detector.in_features[-1]].stride
    return stride << (len(neck.convs) - neck.num_inputs)  # each extra level halves the one before


def _refusal(detector: SetDetector, size: tuple[int, int], reason: str) -> str:
    return (
        f"{type(detector).__name__} with a {type(detector.backbone).__name__} backbone cannot be "
        f"exported with free height and width ({reason}): export it for one size, dynamic=False, "
        f"size=(height, width) (tools/export_onnx.py: --fixed --size {size[0]}x{size[1]})"
    )
