"""Other detectors that run on a CPU beside ours: `--peer NAME=benchmarks/peers.py:FUNCTION`.

    pip install transformers torchvision onnx onnxscript onnxruntime openvino
    python benchmarks/benchmark.py model "Sparse .1=sparse_detr/sparse_detr_r50_10_50ep" --size 640x640 \\
        --peer "RT-DETR=benchmarks/peers.py:rt_detr_r50"

Each function builds a model with random weights, R50 unless its name says otherwise, and 91 or 80
classes. Called with a normalised image (1, 3, H, W), the models end where ours end, before results
become detections; Faster R-CNN, whose proposals are filtered in between, includes that.
"""

from __future__ import annotations

import atexit
import functools
import logging
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

EXPORTED = "sparse_detr/sparse_detr_r50_10_50ep"  # what onnxruntime and OpenVINO run


def deformable_detr() -> nn.Module:
    """Hugging Face's Deformable DETR, two-stage, with box refinement."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    config = DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        two_stage=True,
        with_box_refine=True,
    )
    return DeformableDetrForObjectDetection(config)


def rt_detr_r50() -> nn.Module:
    """Hugging Face's RT-DETR, whose default configuration is R50."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    return RTDetrForObjectDetection(RTDetrConfig())


def faster_rcnn() -> nn.Module:
    """torchvision's Faster R-CNN with R50-FPN, at the size that it is given."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    class AtThatSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)

        def forward(self, image: Tensor) -> list[dict]:
            height, width = image.shape[-2:]
            self.model.transform.min_size = (min(height, width),)
            self.model.transform.max_size = max(height, width)
            return self.model(image)

    return AtThatSize()


def onnxruntime() -> nn.Module:
    """``EXPORTED`` as our ONNX file, in onnxruntime with as many threads as torch."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(_onnx_file(), options, ["CPUExecutionProvider"])
    return _Called(lambda image: session.run(None, {"image": image.numpy()}))


def openvino() -> nn.Module:
    """``EXPORTED`` as our ONNX file, in OpenVINO, in float32."""
    return _openvino("f32")


def openvino_bf16() -> nn.Module:
    """The same in bfloat16."""
    return _openvino("bf16")


def _openvino(precision: str) -> nn.Module:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(_onnx_file()), "CPU", settings)
    return _Called(lambda image: compiled(image.numpy()))


@functools.cache
def _onnx_file() -> str:
    """Exported once; the file goes when the process does."""
    from sparse_detr import build_model
    from sparse_detr.export import export_onnx

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # "Skipping constant folding", per layer
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = str(Path(folder.name) / "model.onnx")
    export_onnx(build_model(EXPORTED, device="cpu"), path)
    return path


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: Tensor):
        return self.function(image)
