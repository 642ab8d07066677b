"""Pictures of an encoder's choice: kept tokens, scores, the decoder's attention.

All are of one image that was alone in its batch; cells of padding, if any, are cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.data import Metadata
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from .data.image import read_image
from .kernels import attention_map_splat
from .modeling import SetDetector, Tokens, TransformerOutput
from .visualize import draw_detections, draw_ground_truth, side_by_side

TITLE_HEIGHT = 18  # pixels


@contextmanager
def recorded_output(model: SetDetector) -> Iterator[list[TransformerOutput]]:
    """Within it, what ``model``'s transformer computes in each call is appended to the list, with
    the decoder's samples, which inference otherwise does not keep.
    """
    outputs: list[TransformerOutput] = []
    transformer = model.transformer

    handles = [
        transformer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "record": True}), with_kwargs=True
        ),
        transformer.register_forward_hook(lambda _, __, output: outputs.append(output)),
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def attention_map(output: TransformerOutput) -> Tensor:
    """(B, N) how much the decoder looks at each token; needs recorded samples."""
    samples = output.decoded.samples
    return attention_map_splat(
        [s.locations for s in samples], [s.weights for s in samples], output.tokens.shapes
    )


def kept_levels(output: TransformerOutput) -> list[np.ndarray]:
    """Per level (H_l, W_l) bool, True where the encoder refreshed the batch's first image."""
    kept = torch.zeros_like(output.tokens.mask[0])
    selected = output.encoded.selected
    assert selected is not None, "a dense encoder chooses nothing"
    return _levels(kept.index_fill_(0, selected[0], True), output.tokens)


def enlarge(level: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H_l, W_l) cells -> (height, width) pixels: every pixel shows the cell it lies in."""
    rows, columns = (
        ((np.arange(pixels) + 0.5) / pixels * cells).astype(int)
        for pixels, cells in zip(size, level.shape, strict=True)
    )
    return level[rows[:, None], columns[None]]


def draw_kept(image: np.ndarray, kept: Sequence[np.ndarray]) -> np.ndarray:
    """The image, the darker and greyer the fewer of the given levels keep a token there.

    Args:
        image: (H, W, 3) uint8; kept: per level (H_l, W_l) bool, one level or several.
    """
    share = np.mean([enlarge(level, image.shape[:2]) for level in kept], axis=0)[..., None]
    grey = image.mean(-1, keepdims=True) * 0.3
    return (share * image + (1 - share) * grey).astype(np.uint8)


def draw_heat(image: np.ndarray, level: np.ndarray, low: float, high: float) -> np.ndarray:
    """A level's values in colour over the grey image: ``low`` is dark blue, ``high`` yellow.

    Args:
        image: (H, W, 3) uint8; level: (H_l, W_l).
    """
    values = np.clip((level - low) / max(high - low, 1e-12), 0, 1)
    colours = colormaps["viridis"](enlarge(values, image.shape[:2]))[..., :3] * 255
    return (0.35 * image.mean(-1, keepdims=True) + 0.65 * colours).astype(np.uint8)


def draw_tokens(
    image: np.ndarray, output: TransformerOutput, *, detected: np.ndarray | None = None
) -> np.ndarray:
    """A sheet of pictures: one row per quantity, one column per level, finest first.

    Rows are what there is: kept tokens and scores of an encoder that chooses, the decoder attention
    map where its samples were recorded. Colours are the same in all levels of a row.

    Args:
        image: (H, W, 3) uint8 RGB, in any resolution.
        output: of a batch with this image alone.
        detected: (H, W, 3) uint8, a picture to put in front.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    encoded, tokens = output.encoded, output.tokens
    if tokens.mask.shape[0] != 1:
        raise ValueError("draw_tokens shows one image: run the images one by one")
    rows = []
    if encoded.selected is not None:
        levels = kept_levels(output)
        share = sum(int(level.sum()) for level in levels) / sum(level.size for level in levels)
        rows.append(
            [
                (
                    f"level {i}: {int(level.sum())} of {level.size} kept"
                    + (f" (all levels: {share:.0%})" if i == 0 else ""),
                    draw_kept(image, [level]),
                )
                for i, level in enumerate(levels)
            ]
        )
    if encoded.scores is not None:
        rows.append(_heat_row("score", image, encoded.scores[0], tokens))
    if output.decoded.samples:
        rows.append(_heat_row("decoder attention", image, attention_map(output)[0], tokens))
    if not rows:
        raise ValueError(
            "nothing to draw: the encoder keeps all tokens, and no decoder samples were recorded "
            "(run the model within recorded_output)"
        )
    if detected is not None:
        blank = ("", np.full_like(detected, 255))
        rows = [[blank if i else ("detections", detected), *row] for i, row in enumerate(rows)]
    return np.concatenate([side_by_side([_titled(*entry) for entry in row]) for row in rows])


@torch.no_grad()
def draw_example(
    model: SetDetector,
    record: dict,
    mapper,
    metadata: Metadata,
    *,
    threshold: float = 0.5,
    scale: float = 1.0,
) -> np.ndarray:
    """One picture of an image: ground truth | detections | kept tokens, if the encoder chooses.

    Args:
        model: a ``SetDetector`` in eval mode.
        record: detectron2 dataset dict.
        mapper: the data set's inference mapper.

    Returns:
        (scale * H, about 2 or 3 times scale * W, 3) uint8 RGB.
    """
    image = read_image(record["file_name"], "RGB")
    entry = mapper(record)
    with recorded_output(model) as outputs:
        instances = model([entry])[0]["instances"]
    pictures = [
        draw_ground_truth(image, record, metadata, scale=scale),
        draw_detections(image, instances, metadata, threshold=threshold, scale=scale),
    ]
    if outputs[0].encoded.selected is not None:
        size = pictures[0].shape[1::-1]
        enlarged = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        pictures.append(draw_kept(enlarged, kept_levels(outputs[0])))
    return side_by_side(pictures)


def _levels(values: Tensor, tokens: Tokens) -> list[np.ndarray]:
    """(N,) of the batch's first image -> per level (H_l, W_l), without padding."""
    parts = values.detach().cpu().split([h * w for h, w in tokens.shapes])
    return [
        part.view(shape)[:height, :width].numpy()
        for part, shape, (width, height) in zip(parts, tokens.shapes, tokens.valid_cells[0].tolist())
    ]


def _heat_row(name: str, image: np.ndarray, values: Tensor, tokens: Tokens) -> list[tuple[str, np.ndarray]]:
    """One picture per level; the colours span all but the extreme percent of the values."""
    levels = _levels(values, tokens)
    low, high = np.percentile(np.concatenate([level.flatten() for level in levels]), (1, 99))
    return [
        (
            f"{name}, level {i}" + (f": {low:.2g} (blue) to {high:.2g}" if i == 0 else ""),
            draw_heat(image, level, low, high),
        )
        for i, level in enumerate(levels)
    ]


def _titled(title: str, picture: np.ndarray) -> np.ndarray:
    """The picture with a line of text above it."""
    canvas = Image.new("RGB", (picture.shape[1], picture.shape[0] + TITLE_HEIGHT), "white")
    canvas.paste(Image.fromarray(picture), (0, TITLE_HEIGHT))
    ImageDraw.Draw(canvas).text((2, 3), title, fill="black")
    return np.asarray(canvas)
