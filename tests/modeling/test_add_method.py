"""The example of docs/add_method.md, word for word: it builds, trains and detects."""

import re
from pathlib import Path

import torch
from detectron2.config import instantiate

from .tiny import sample, shrink

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_method.md"


def test_the_example_trains_and_detects():
    names = {"__name__": "example"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    torch.manual_seed(0)
    model = instantiate(shrink(names["cfg"].model))
    losses = model([sample(64, 96), sample(80, 64, seed=1)])
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        detections = model([{"image": torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)}])
    assert len(detections[0]["instances"]) > 0
