"""Inference never waits for a GPU between the image and the predictions: the host only launches.

Told without a GPU: PyTorch's meta device computes nothing, and every operation that hands a value from there
to the host, or that blocks until one of the host's is copied, is seen.
"""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import ImageList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_detr.config import get_config
from sparse_detr.modeling import proposals

from .tiny import METHODS, shrink


class Waits(TorchDispatchMode):
    """Collects the operations that would wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x.device.type == "meta" for x in inputs]
        read = name in ("_local_scalar_dense", "nonzero", "equal")
        read |= name == "index" and any(x.dtype == torch.bool for x in inputs[1:])
        written = name == "lift_fresh"  # a list that became a tensor there
        # A tensor of the host among the device's is copied; a number travels with the launch.
        copied = len({t for x, t in zip(inputs, there) if x.dim()}) > 1
        copied |= name == "_to_copy" and there[0] != (kwargs.get("device", inputs[0].device).type == "meta")
        if (any(there) and (read or written or copied)) or (copied and not kwargs.get("non_blocking")):
            self.found.append(name)
        return function(*args, **kwargs)


@pytest.mark.parametrize("sizes", [[(64, 96)], [(64, 96), (50, 70)]], ids=["one image", "padded batch"])
@pytest.mark.parametrize("exact_sizes", [False, True], ids=["published", "exact sizes"])
@pytest.mark.parametrize("config", METHODS)
def test_inference(config, sizes, exact_sizes, monkeypatch):
    # Salience DETR's non-maximum suppression does wait: torchvision's returns as many as it keeps.
    monkeypatch.setattr(proposals, "nms", lambda boxes, scores, threshold: scores.argsort())
    cfg = shrink(get_config(config).model)
    cfg.exact_sizes = exact_sizes
    model = instantiate(cfg).eval().to("meta")
    images = torch.empty(len(sizes), 3, *sizes[0], device="meta")
    with torch.no_grad(), Waits() as waits:
        output = model.detect(ImageList(images, sizes))
    assert output.logits.device.type == "meta" and output.logits.shape[0] == len(sizes)
    assert waits.found == []


def test_what_waits_is_seen():
    x = torch.empty(3, device="meta")
    with Waits() as waits:
        torch.ones(3).to("meta", non_blocking=True)
        x * torch.tensor(2.0)
        assert waits.found == []
        torch.ones(3).to("meta")
        torch.tensor([1.0], device="meta")
        x[torch.tensor([0, 2])]
        for wait in (lambda: x[0].item(), lambda: x[x > 0], lambda: torch.equal(x, x)):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()
    assert waits.found == ["_to_copy", "lift_fresh", "index", "_local_scalar_dense", "index", "equal"]
