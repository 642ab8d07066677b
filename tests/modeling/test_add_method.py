"""The example of docs/add_method.md, word for word: it builds, trains, detects, and minds padding."""

import re
from pathlib import Path

import torch
from detectron2.config import instantiate

from .tiny import feature_maps, masks, sample, shrink

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_method.md"


def example():
    """The tiny model that the page's blocks compose."""
    names = {"__name__": "example"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    torch.manual_seed(0)
    return instantiate(shrink(names["cfg"].model))


def test_an_image_is_encoded_alone_as_in_a_batch():
    transformer = example().double().eval().transformer
    sizes = ((1, 1), (0.5, 0.75), (1, 0.5))
    maps, batch_masks = feature_maps(3), masks(*sizes)
    batched = transformer.encoder(transformer.tokenize(maps, batch_masks), None)
    for image in range(len(sizes)):
        rows = [int((~m[image, :, 0]).sum()) for m in batch_masks]
        columns = [int((~m[image, 0]).sum()) for m in batch_masks]
        cropped = [m[image : image + 1, :, :h, :w] for m, h, w in zip(maps, rows, columns)]
        clear = [torch.zeros(1, h, w, dtype=torch.bool) for h, w in zip(rows, columns)]
        alone = transformer.encoder(transformer.tokenize(cropped, clear, has_padding=False), None)
        valid = ~torch.cat([m[image].flatten() for m in batch_masks])
        torch.testing.assert_close(batched.memory[image, valid], alone.memory[0])
        assert int(batched.kept.budgets[image]) == alone.kept.ranked.shape[1]


def test_the_example_trains_and_detects():
    model = example()
    losses = model([sample(64, 96), sample(80, 64, seed=1)])
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        detections = model([{"image": torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)}])
    assert len(detections[0]["instances"]) > 0
