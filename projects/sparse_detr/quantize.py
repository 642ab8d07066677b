"""A trained detector in int8 on x86 CPUs, without training: post-training quantization.

torchao's PT2E quantizes, with its quantizer for x86; torch's own oneDNN operators then compute. Weights
are int8, one scale per output channel; activations are uint8 with a scale and a zero point per tensor, from
histograms over the images that it is calibrated with.

In int8: the backbone's convolutions with what follows them (ReLU, sums), the neck's convolutions on the
backbone's maps, and the feed-forward blocks of the encoder. All else stays as it is, bfloat16 under autocast
or float32: the whole decoder and all heads, which the published DETR-type detectors lose their AP with; the
sampling offsets, attention weights and scores, whose rounding moves samples and exchanges tokens; norms, and
the arithmetic of boxes. Deformable attention is this package's operator as before.

Each part is quantized as a graph of its own, in which no size of the image occurs, so that images of any
size can follow.
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping

import torch
from detectron2.config import LazyConfig
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from .config import load_config
from .errors import UserError
from .modeling import SetDetector
from .modeling.backbone import FrozenNormConv2d, folded_norm
from .modeling.layers import FFN
from .modeling.packing import unpack_weights
from .predictor import Predictor

MAPS = "maps"  # the part that is backbone and neck; the others are named as in the encoder
FORMAT = 1


@torch.no_grad()
def quantize(detector: SetDetector, batches: Iterable[list[dict]]) -> dict[str, ExportedProgram]:
    """The parts of ``detector`` that int8 is for, calibrated and quantized.

    Args:
        detector: on the CPU; it is not changed.
        batches: images as the model takes them, of the kind that it will see; no annotations are needed.

    Returns:
        For ``with_int8`` and ``save``.

    Raises:
        UserError: torchao is missing, there is no image, or the backbone cannot be quantized.
    """
    _require_torchao()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    parts = _parts(detector)
    observed = {}
    for name, (module, example) in parts.items():
        config = x86.get_default_x86_inductor_quantization_config()
        graph = _export(module, example).module(check_guards=False)
        assert isinstance(graph, GraphModule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pooling, which stays as it is
            observed[name] = prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
    watched = _replaced(detector, observed)
    sizes: list[tuple[int, int]] = []
    for batch in batches:
        watched(batch)
        sizes += [(entry["image"].shape[1], entry["image"].shape[2]) for entry in batch]
    if not sizes:
        raise UserError("no image to calibrate with: pass some of the kind that will be predicted")
    examples = {name: example for name, (_, example) in parts.items()}
    examples[MAPS] = _image(*sorted(sizes, key=lambda size: size[0] * size[1])[len(sizes) // 2])
    return {name: _export(convert_pt2e(graph), examples[name]) for name, graph in observed.items()}


def with_int8(detector: SetDetector, programs: Mapping[str, ExportedProgram]) -> SetDetector:
    """A copy of ``detector`` for inference on the CPU that computes the parts in ``programs`` in int8.

    Raises:
        UserError: torchao is missing, or does not find its operators for a part.
    """
    _require_torchao()
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    graphs = {}
    for name, program in programs.items():
        graph = program.module(check_guards=False)
        with torch.no_grad():
            # With a size, the median of the calibration's images: oneDNN then arranges the weights for its
            # fast operators. Others can follow; the further away, the slower.
            lowered = lower_pt2e_quantized_to_x86(graph, program.example_inputs[0])
        lowered._forward_pre_hooks.clear()  # which would accept this size alone
        left = [str(n.target) for n in lowered.graph.nodes if _is_float_product(n)]
        if left:
            raise UserError(
                f"{len(left)} products of {name} would stay in floating point ({left[0]}): torchao has no "
                f"int8 operator for them in the backbone {type(detector.backbone).__name__}"
            )
        graphs[name] = lowered
    return _replaced(detector, graphs)


def save(path: str | os.PathLike, predict: Predictor, programs: Mapping[str, ExportedProgram]) -> None:
    """Writes a predictor's config, weights and class names, and the quantized parts, as one file."""
    stored = {}
    for name, program in programs.items():
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        stored[name] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    content = {
        "format": FORMAT,
        "config": _to_yaml(predict),
        "model": predict.model.state_dict(),
        "class_names": predict.class_names,
        "int8": stored,
    }
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    torch.save(content, path)


def load(path: str | os.PathLike, *, dtype: torch.dtype | str = "auto", threshold: float = 0.0) -> Predictor:
    """A predictor on the CPU whose model is the one in a file of ``save``.

    Args:
        dtype, threshold: as of ``Predictor``; ``dtype`` is that of what int8 is not for.

    Raises:
        UserError: there is no such file, it is another one, or torchao is missing.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no file {os.path.abspath(path)}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "int8" not in content:
        raise UserError(f"{os.fspath(path)} is no file of sparse-detr quantize")
    _require_torchao()
    with tempfile.TemporaryDirectory() as folder:
        config = os.path.join(folder, "config.yaml")
        with open(config, "w", encoding="utf-8") as file:
            file.write(content["config"])
        cfg = load_config(config)
    predict = Predictor(cfg, path, device="cpu", dtype=dtype, threshold=threshold)
    programs = {
        name: torch.export.load(io.BytesIO(stored.numpy().tobytes()))
        for name, stored in content["int8"].items()
    }
    predict.model = with_int8(predict.model, programs)
    return predict


class _Maps(nn.Module):
    """Image (B, 3, H, W) -> maps (B, C, H_l, W_l): the backbone, and the neck's convolutions behind it."""

    def __init__(self, detector: SetDetector):
        super().__init__()
        self.backbone = copy.deepcopy(detector.backbone)
        self.in_features = detector.in_features
        self.convs = copy.deepcopy(detector.neck.convs)[: detector.neck.num_inputs + 1]
        unpack_weights(self)
        _with_plain_convolutions(self.backbone)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.backbone(image)
        maps = [features[name] for name in self.in_features]
        maps += maps[-1:] * (len(self.convs) - len(maps))  # the first extra level, of the last map
        return [conv(one) for conv, one in zip(self.convs, maps)]


class _Graph(nn.Module):
    """Calls a graph in float32, whatever the precision around it is."""

    graph: GraphModule

    def __init__(self, graph: GraphModule):
        super().__init__()
        self.__dict__["graph"] = graph  # no submodule: exported graphs refuse train() and eval()

    def call(self, x: Tensor):
        with torch.autocast("cpu", enabled=False):
            return self.graph(x.float())


class _MapsGraph(_Graph):
    """In the place of the backbone: its maps by their number."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {str(level): one for level, one in enumerate(self.call(image))}


class _TokensGraph(_Graph):
    """In the place of a module that maps tokens (..., C) to tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _parts(detector: SetDetector) -> dict[str, tuple[nn.Module, Tensor]]:
    """The modules that become int8, each with an input to trace it with."""
    parts: dict[str, tuple[nn.Module, Tensor]] = {MAPS: (_Maps(detector).eval(), _image(640, 640))}
    for name, module in detector.transformer.encoder.named_modules():
        if isinstance(module, FFN):
            module = copy.deepcopy(module).eval()
            unpack_weights(module)
            parts[name] = module, torch.zeros(2048, module.linear1.in_features)
    return parts


def _image(height: int, width: int) -> Tensor:
    return torch.zeros(1, 3, height, width).contiguous(memory_format=torch.channels_last)


def _replaced(detector: SetDetector, graphs: Mapping[str, GraphModule]) -> SetDetector:
    """A copy of ``detector`` with the graphs in the places of the parts."""
    detector = copy.deepcopy(detector).eval()
    for name, graph in graphs.items():
        if name != MAPS:
            parent, _, leaf = name.rpartition(".")
            setattr(detector.transformer.encoder.get_submodule(parent), leaf, _TokensGraph(graph))
            continue
        neck = detector.neck
        done = len(neck.convs[: neck.num_inputs + 1])
        for level in range(done):
            neck.convs[level] = nn.Identity()
        neck.num_inputs = done
        detector.backbone = _MapsGraph(graph)
        detector.in_features = [str(level) for level in range(done)]
    return detector


def _export(module: nn.Module, example: Tensor) -> ExportedProgram:
    """A trace in which no size occurs: of the image's sides, or of the number of tokens."""
    free = {axis: Dim.DYNAMIC for axis in ((2, 3) if example.dim() == 4 else (0,))}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (example,), dynamic_shapes=(free,))
    except Exception as error:  # the tracers' own types are private and change with torch
        raise UserError(
            f"int8: this backbone cannot be traced with free sizes ({str(error)[:200]})"
        ) from error
    if any(n.target is torch.ops.aten.sym_size.int for n in program.graph.nodes):
        raise UserError("int8: this backbone computes with the sizes of its maps; ResNets do not")
    return program


def _with_plain_convolutions(module: nn.Module) -> None:
    """Changes detectron2's convolutions to torch's, which the quantizer knows, frozen norms in their
    weights and others behind them."""
    for name, part in module.named_children():
        if not isinstance(part, Conv2d):
            _with_plain_convolutions(part)
            continue
        behind = [part.norm, part.activation]
        if isinstance(part, FrozenNormConv2d):
            weight, bias = folded_norm(part.weight, part.bias, part.norm)
            part.weight, part.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
            behind = [part.activation]
        plain = nn.Conv2d(
            part.in_channels,
            part.out_channels,
            part.kernel_size,
            part.stride,
            part.padding,
            part.dilation,
            part.groups,
            bias=part.bias is not None,
        )
        plain.weight, plain.bias = part.weight, part.bias
        setattr(module, name, nn.Sequential(plain, *(_Called(f) for f in behind if f is not None)))


class _Called(nn.Module):
    """A norm or an activation, which may be a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _is_float_product(node: torch.fx.Node) -> bool:
    name = str(node.target)
    return node.op == "call_function" and any(
        name.startswith(start)
        for start in ("aten.conv", "aten.linear", "aten.addmm", "aten.mm", "mkldnn._conv", "mkldnn._linear")
    )


def _to_yaml(predict: Predictor) -> str:
    cfg = copy.deepcopy(predict.cfg)
    if predict.keep_ratio is not None and "keep_ratio" in cfg.model.transformer.encoder:
        cfg.model.transformer.encoder.keep_ratio = float(predict.keep_ratio)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        LazyConfig.save(cfg, path)
        with open(path, encoding="utf-8") as file:
            return file.read()


def _require_torchao() -> None:
    try:
        # Registers the operators of stored programs, and what lowering replaces them by.
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    except ImportError as error:
        raise UserError("torchao is not installed: pip install torchao") from error
