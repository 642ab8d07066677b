"""Whole detectors and their encoders, on a batch of images of one size, random weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_detr import config
from sparse_detr.analysis import analyze
from sparse_detr.devices import mixed_precision
from sparse_detr.modeling import SetDetector, pack_weights

from .ops import load
from .report import named_config
from .timing import Timing, peak_memory, take_turns


@dataclass
class Contender:
    """A detector in inference: normalised images (B, 3, H, W) to their predictions."""

    name: str
    model: nn.Module
    detect: Callable[[Tensor], object]
    encoder: nn.Module | None
    precision: str = "float32"  # of the products, see ``computing_in``
    trains: bool = True  # has a training step of its own
    timings: dict[str, Timing] = field(default_factory=dict)  # "model", "encoder", "training step"

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def ours(text: str, device: str) -> Contender:
    """``[NAME=]CONFIG [key=value ...]``."""
    name, path, overrides = named_config(text)
    torch.manual_seed(0)
    model = instantiate(config.load_config(path, overrides).model).to(device).eval()
    pack_weights(model)  # as ``Predictor`` does; training runs unpacked
    return Contender(name, model, _detect(model), model.transformer.encoder)


def _detect(model: nn.Module) -> Callable[[Tensor], object]:
    return lambda image: model.detect(ImageList(image, [tuple(image.shape[-2:])] * image.shape[0]))


def _computed_in(precision: str, detect: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    def computed(image: Tensor) -> object:
        with computing_in(precision, image.device):
            return detect(image)

    return computed


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Products in float32, in tf32 (float32 with short mantissas, on GPUs), or under autocast in bfloat16,
    as ``Predictor(dtype="bfloat16")`` runs a model."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = precision == "tf32"
        with mixed_precision(device, torch.bfloat16 if precision == "bfloat16" else torch.float32):
            yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def in_precision(contender: Contender, precision: str) -> Contender:
    """The same model, computed in ``precision``."""
    detect = _computed_in(precision, contender.detect)
    short = precision.replace("bfloat16", "bf16")
    return Contender(f"{contender.name}, {short}", contender.model, detect, None, precision)


def compiled(contender: Contender, images: Tensor, **options: object) -> Contender:
    """The same model through torch.compile, for batches of the shape of ``images``; compiled at once."""
    torch._dynamo.config.cache_size_limit = 64  # all contenders are compiled from the same lines
    whole = torch.compile(_detect(contender.model), dynamic=False, fullgraph=True, **options)
    detect = _computed_in(contender.precision, whole)
    with torch.inference_mode():
        detect(images)
    name = f"{contender.name}, compiled"
    return Contender(name, contender.model, detect, None, contender.precision, trains=False)


def captured(contender: Contender, images: Tensor) -> Contender:
    """The same model as a CUDA graph, for batches of the shape of ``images``.

    Raises:
        RuntimeError: it cannot be captured, or does not compute the same.
    """
    static, constants = images.clone(), HostConstants()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(stream), constants:
            contender.detect(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), constants.again():
            output = contender.detect(static)
        if constants.left:
            raise RuntimeError("it did other operations the second time")

        def detect(image: Tensor) -> object:
            static.copy_(image)
            graph.replay()
            return output

        other = images.flip(-1)
        expected = contender.detect(other)
        found = detect(other)
        error = (found.logits.float() - expected.logits.float()).abs().max()
        if not error <= (1e-3 if contender.precision == "float32" else 0.1):
            raise RuntimeError(f"its logits are {error:.1e} off")
    name = f"{contender.name}, CUDA graph"
    return Contender(name, contender.model, detect, None, contender.precision, trains=False)


class HostConstants(TorchDispatchMode):
    """Tensors that a model makes on the host and copies to the device: numbers that follow from an image's
    size. Made once, and handed out for the same operations in ``again``: a CUDA graph would copy from the
    host's memory when that is somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[object, Tensor]] = {}  # by the number of the operation
        self.left: dict[int, tuple[object, Tensor]] = {}
        self.number = 0

    def again(self) -> HostConstants:
        self.left, self.number = dict(self.made), 0
        return self

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        if self.number in self.left:
            same, result = self.left.pop(self.number)
            if same is not function:
                raise RuntimeError(f"operation {self.number} was {same}, now it is {function}")
            return result
        result = function(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if isinstance(result, Tensor) and inputs and result.device.type != "cpu":
            if all(x.device.type == "cpu" for x in inputs):
                self.made[self.number] = function, result
        return result


def in_int8(contender: Contender, size: tuple[int, int]) -> Contender:
    """The same model in int8, its ranges those of a random image; what int8 is not for is in bfloat16."""
    from sparse_detr.quantize import quantize, with_int8  # needs torchao

    assert isinstance(contender.model, SetDetector)
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 255
    model = with_int8(contender.model, quantize(contender.model, [[{"image": pixels}]]))
    detect = _computed_in("bfloat16", _detect(model))
    # Not as a detector, whose multiply-adds would be held against a rate of another precision.
    return Contender(f"{contender.name}, int8", nn.ModuleList([model]), detect, None, "bfloat16")


def multiply_adds(contender: Contender, size: tuple[int, int]) -> int | None:
    """Of one image; None for peers, whose operators nobody has told fvcore."""
    return _multiply_adds(contender.model, size) if isinstance(contender.model, SetDetector) else None


@functools.cache  # a model in two precisions is traced once
def _multiply_adds(model: SetDetector, size: tuple[int, int]) -> int:
    return analyze(model, size).total.macs


def peer(text: str, device: str) -> Contender:
    """``NAME=FILE.py:FUNCTION``: a function that returns an eval-mode module, called with the image;
    its attribute ``encoder``, if it has one, is timed as well."""
    name, build = load(text)
    torch.manual_seed(0)
    model = build().to(device).eval()
    return Contender(name, model, model, getattr(model, "encoder", None))


def batches(size: tuple[int, int], batch: int, device: str) -> list[Tensor]:
    """Two of random images (batch, 3, *size)."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, *size, generator=g).to(device) for _ in range(2)]


def measure(contenders: list[Contender], images: list[Tensor], rounds: int, device: str) -> None:
    """Fills in time and memory of inference, and the time of the encoder on what it receives there."""
    with torch.inference_mode():
        received = {}
        for contender in contenders:
            if contender.encoder is not None:
                received[contender.name] = _inputs(contender, images[0])
        found = take_turns(
            {c.name: lambda n, c=c: c.detect(images[n % 2]) for c in contenders}, rounds, device, "model"
        )
        for contender in contenders:
            contender.timings["model"] = found[contender.name]
            if contender.parameters:  # others do not take their memory from torch
                found[contender.name].memory = peak_memory(lambda c=contender: c.detect(images[0]), device)
        found = take_turns(
            {
                c.name: lambda _, c=c: c.encoder(*received[c.name][0], **received[c.name][1])
                for c in contenders
                if c.name in received
            },
            rounds,
            device,
            "encoder",
        )
    for contender in contenders:
        if contender.name in found:
            contender.timings["encoder"] = found[contender.name]


def measure_training(
    contenders: list[Contender],
    size: tuple[int, int],
    rounds: int,
    device: str,
    batch: int = 1,
    boxes: int = 10,
) -> None:
    """Fills in time and memory of forward, losses and backward, with that many boxes per image."""
    g = torch.Generator().manual_seed(0)
    height, width = size
    corner = torch.rand(boxes, 2, generator=g) * 0.7
    extent = 0.05 + 0.25 * torch.rand(boxes, 2, generator=g)
    scale = torch.tensor([width, height, width, height])
    instances = Instances(
        size,
        gt_boxes=Boxes(torch.cat([corner, corner + extent], -1) * scale),
        gt_classes=torch.zeros(boxes, dtype=torch.int64),
    )
    image = (torch.rand(3, height, width, generator=g) * 255).to(device)

    def step(contender: Contender, _: int = 0) -> None:
        contender.model.zero_grad(set_to_none=True)
        with computing_in(contender.precision, image.device):
            losses = contender.model([{"image": image, "instances": instances}] * batch)
        sum(losses.values()).backward()

    trained = [c for c in contenders if isinstance(c.model, SetDetector) and c.trains]
    for contender in trained:
        contender.model.train()
        contender.model.requires_grad_(True)  # frozen layers too, so that bases compare alike
    found = take_turns({c.name: lambda n, c=c: step(c, n) for c in trained}, rounds, device, "training step")
    for contender in trained:
        contender.timings["training step"] = found[contender.name]
        contender.model.zero_grad(set_to_none=True)
        step(contender)  # gradients exist already, as in all steps but the first
        found[contender.name].memory = peak_memory(lambda c=contender: step(c), device)
        contender.model.zero_grad(set_to_none=True)


def _inputs(contender: Contender, image: Tensor) -> tuple[tuple, dict]:
    """What the encoder receives in a pass of the whole."""
    seen = []
    hook = contender.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        contender.detect(image)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise SystemExit(f"{contender.name}: the encoder was called {len(seen)} times, expected once")
    return seen[0]
