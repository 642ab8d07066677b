"""*Shapes*: a small detection set in COCO format, drawn from a seed; nothing is downloaded.

Five classes, each an outline. Discs and stars share a hue, triangles and crosses another, so that colour
alone names little more than half of the objects; backgrounds are cluttered and of muted colours.
Objects are textured, rotated, squeezed, partly hidden by others or cut by the border, and span an order
of magnitude in size; one image in fourteen holds none.
Distractors (rings, bars, blobs, half discs; muted, or as vivid as an object) are not annotated.
Boxes and areas are those of the visible pixels.

Needs numpy and Pillow only. numpy's legacy generator is used because its stream never changes.
"""

import colorsys
import json
import logging
import math
import os
from collections.abc import Sequence

import numpy as np
from detectron2.utils import comm
from PIL import Image, ImageDraw

from .register import coco_dataset

logger = logging.getLogger(__name__)

CLASSES = ("disc", "triangle", "square", "star", "cross")
DISTRACTORS = ("ring", "bar", "blob", "half disc")
HUES = {"shared": (0, 1, 2, 0, 1), "own": (0, 1, 2, 3, 4)}  # of the classes, in steps around the circle
SPLITS = {"train": 800, "val": 128}  # images
VERSION = 4  # of the drawing code: part of the reuse check below
SUPERSAMPLING = 4


def shapes_dataset(
    *,
    names: str | Sequence[str],
    root: str,
    split: str,
    seed: int = 0,
    num_images: int | None = None,
    hues: str = "shared",
    filter_empty: bool = False,
) -> list[dict]:
    """A config's ``dataloader.*.dataset``: draws a split if ``root`` lacks it, and registers it.

    Args:
        names: name to register it under (``dataloader.evaluator.dataset_name`` refers to it).
        root: folder that receives ``<split>.json`` and ``<split>/*.png``.
        split: "train" or "val".
        seed, num_images, hues: see ``generate_shapes``.
        filter_empty: leave out the images without objects.
    """
    if comm.is_main_process():
        generate_shapes(root, split, seed=seed, num_images=num_images, hues=hues)
    comm.synchronize()
    return coco_dataset(
        names=names,
        json_file=os.path.join(root, f"{split}.json"),
        image_root=os.path.join(root, split),
        filter_empty=filter_empty,
    )


def generate_shapes(
    root: str, split: str, *, seed: int = 0, num_images: int | None = None, hues: str = "shared"
) -> str:
    """Writes one split, the same bytes for the same arguments; returns the path of its JSON.

    Args:
        root: target folder; a split that is already there, drawn from the same arguments, is left
            as it is.
        split: "train" or "val". The splits of one seed share no image.
        seed: non-negative integer.
        num_images: default 800 (train) or 128 (val).
        hues: "shared", or "own": each class has one, which gives it away.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if hues not in HUES:
        raise ValueError(f"hues must be one of {', '.join(HUES)}, not {hues!r}")
    num_images = SPLITS[split] if num_images is None else num_images
    info = {
        "description": "Shapes: a synthetic detection set",
        "version": VERSION,
        "seed": seed,
        "split": split,
        "num_images": num_images,
        "hues": hues,
    }
    json_file = os.path.join(root, f"{split}.json")
    if _info(json_file) == info:
        return json_file

    logger.info("drawing %d images of the Shapes set (%s) into %s", num_images, split, root)
    os.makedirs(os.path.join(root, split), exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(num_images):
        rng = np.random.RandomState([seed, list(SPLITS).index(split), index])
        pixels, objects = draw_image(rng, HUES[hues])
        file_name = f"{index:06d}.png"
        Image.fromarray(pixels).save(os.path.join(root, split, file_name), compress_level=1)
        height, width = pixels.shape[:2]
        images.append({"id": index + 1, "file_name": file_name, "height": height, "width": width})
        for category, mask in objects:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = int(columns[0]), int(rows[0])
            bbox = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": category + 1,
                    "bbox": bbox,
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    content = {
        "info": info,
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    partial = f"{json_file}.{os.getpid()}.tmp"
    with open(partial, "w") as file:
        json.dump(content, file)
    os.replace(partial, json_file)  # last, and at once: a JSON that exists is complete
    return json_file


def _info(json_file: str) -> dict | None:
    try:
        with open(json_file) as file:
            return json.load(file).get("info")
    except (OSError, ValueError):
        return None


def draw_image(
    rng: np.random.RandomState, hues: Sequence[int] = HUES["shared"]
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draws one image.

    Args:
        hues: of the classes, evenly spaced numbers from 0.

    Returns:
        (H, W, 3) uint8 RGB pixels, 144 to 208 on a side, and for each object its class (0 to 4) and
        its (H, W) bool mask of visible pixels.
    """
    height, width = rng.randint(144, 209, size=2).tolist()
    canvas = _background(rng, height, width)
    num_objects = 0 if rng.rand() < 0.07 else min(1 + rng.poisson(3.2), 9)
    kinds = [rng.randint(len(CLASSES)) for _ in range(num_objects)]
    kinds += [-1] * rng.randint(1, 5)  # distractors
    sizes = np.exp(rng.uniform(math.log(13), math.log(0.85 * min(height, width)), len(kinds)))

    layers: list[tuple[int, int, np.ndarray]] = []  # class, full area in pixels, mask of visible pixels
    for i in np.argsort(-sizes, kind="stable"):  # small on top of large
        name = CLASSES[kinds[i]] if kinds[i] >= 0 else DISTRACTORS[rng.randint(len(DISTRACTORS))]
        alpha = _silhouette(rng, name, sizes[i])
        placed = _place(rng, alpha, layers, height, width)
        if placed is None:
            continue
        coverage, full_area = placed
        mask = coverage > 0.5
        hue = (hues[kinds[i]], max(hues) + 1) if kinds[i] >= 0 else None
        _paint(rng, canvas, coverage, mask, hue)
        layers = [(kind, area, visible & ~mask) for kind, area, visible in layers]
        layers.append((kinds[i], full_area, mask))

    canvas += rng.normal(0, rng.uniform(2, 8), canvas.shape)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return pixels, [(kind, visible) for kind, _, visible in layers if kind >= 0]


def _outline(rng: np.random.RandomState, name: str) -> list[tuple[float, float]]:
    """Corners of a shape inside the unit circle."""

    def around(
        radii: np.ndarray, start: float = 0.0, sweep: float = 2 * math.pi
    ) -> list[tuple[float, float]]:
        angles = start + sweep * np.arange(len(radii)) / len(radii)
        return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))

    if name in ("disc", "ring"):
        return around(np.ones(48))
    if name == "triangle":
        return around(np.ones(3))
    if name == "square":
        return around(np.ones(4))
    if name == "star":
        return around(np.tile([1.0, rng.uniform(0.38, 0.48)], 5))
    if name == "cross":
        w = rng.uniform(0.24, 0.34)
        quarter = [(1, -w), (1, w), (w, w)]
        turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
        return [(c * x - s * y, s * x + c * y) for c, s in turns for x, y in quarter]
    if name == "bar":
        w = rng.uniform(0.06, 0.2)
        return [(-1, -w), (1, -w), (1, w), (-1, w)]
    if name == "half disc":
        return around(np.ones(25), sweep=math.pi * 25 / 24)
    assert name == "blob"
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    waves = np.zeros_like(angles)
    for k in (2, 3, 5):
        waves += rng.uniform(0.1, 0.25) * np.cos(k * angles + rng.uniform(0, 2 * math.pi))
    return around((1 + waves) / 1.6)


def _silhouette(rng: np.random.RandomState, name: str, size: float) -> np.ndarray:
    """(h, w) coverage in [0, 1] of a rotated, squeezed shape, about ``size`` pixels long."""
    corners = np.array(_outline(rng, name), dtype=np.float64)
    angle, squeeze = rng.uniform(0, 2 * math.pi), rng.uniform(0.75, 1.0)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    tilt = rng.uniform(0, 2 * math.pi)
    axis = np.array([math.cos(tilt), math.sin(tilt)])
    corners = corners @ rotation.T
    corners += (squeeze - 1) * (corners @ axis)[:, None] * axis
    corners -= corners.min(0)
    scale = size * SUPERSAMPLING / corners.max()
    corners = corners * scale + SUPERSAMPLING / 2
    extent = np.ceil(corners.max(0) / SUPERSAMPLING).astype(int) + 1
    image = Image.new("L", tuple((extent * SUPERSAMPLING).tolist()))
    draw = ImageDraw.Draw(image)
    draw.polygon([tuple(c) for c in corners.tolist()], fill=255)
    if name == "ring":
        centre = corners.mean(0)
        hole = centre + (corners - centre) * rng.uniform(0.55, 0.8)
        draw.polygon([tuple(c) for c in hole.tolist()], fill=0)
    return np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def _place(
    rng: np.random.RandomState,
    alpha: np.ndarray,
    layers: list[tuple[int, int, np.ndarray]],
    height: int,
    width: int,
) -> tuple[np.ndarray, int] | None:
    """Finds a spot that keeps every object at least 60 % visible.

    Returns:
        (H, W) coverage and the shape's full area in pixels, or None if no spot was found.
    """
    h, w = alpha.shape
    full_area = max(int((alpha > 0.5).sum()), 1)
    for _ in range(8):
        # up to a fifth of the extent may lie outside the image
        top = rng.randint(-(h // 5), max(height - h + h // 5, -(h // 5)) + 1)
        left = rng.randint(-(w // 5), max(width - w + w // 5, -(w // 5)) + 1)
        y0, y1, x0, x1 = max(top, 0), min(top + h, height), max(left, 0), min(left + w, width)
        coverage = np.zeros((height, width), np.float32)
        coverage[y0:y1, x0:x1] = alpha[y0 - top : y1 - top, x0 - left : x1 - left]
        mask = coverage > 0.5
        if mask.sum() < 0.6 * full_area:
            continue
        if all((visible & ~mask).sum() >= 0.6 * area for _, area, visible in layers):
            return coverage, full_area
    return None


def _paint(
    rng: np.random.RandomState,
    canvas: np.ndarray,
    coverage: np.ndarray,
    mask: np.ndarray,
    hue: tuple[int, int] | None,
) -> None:
    """Fills a silhouette with a texture that stands out from what is behind it.

    ``hue``: which of how many, with a spread into its neighbours; None for a distractor.
    """
    behind = canvas[mask].mean(0)
    for _ in range(20):
        if hue is not None:
            colour = _vivid(rng, (hue[0] + rng.normal(0, 0.25)) / hue[1])
        else:
            colour = _vivid(rng, rng.rand()) if rng.rand() < 0.25 else _muted(rng)
        if np.abs(colour - behind).max() > 70:
            break
    rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    patch = canvas[box]
    patch += coverage[box][..., None] * (_texture(rng, colour, *patch.shape[:2]) - patch)


def _vivid(rng: np.random.RandomState, hue: float) -> np.ndarray:
    """(3,) RGB colour of a hue in turns, saturated and bright."""
    colour = colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.65, 1.0), rng.uniform(0.6, 1.0))
    return 255 * np.array(colour)


def _muted(rng: np.random.RandomState) -> np.ndarray:
    """(3,) RGB colour near a grey."""
    return np.clip(rng.uniform(10, 245) + rng.uniform(-32, 32, 3), 0, 255)


def _background(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32 clutter: cloudy colour with a few large textured patches."""
    low, high = _muted(rng), _muted(rng)
    clouds = _clouds(rng, height, width, rng.randint(2, 7))[..., None]
    canvas = (low + (high - low) * clouds).astype(np.float32)
    for _ in range(rng.randint(1, 4)):
        alpha = 1 / (1 + np.exp(-12 * (_clouds(rng, height, width, rng.randint(2, 5))[..., None] - 0.6)))
        canvas += alpha * (_texture(rng, _muted(rng), height, width) - canvas)
    return canvas


def _texture(rng: np.random.RandomState, colour: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32: plain, shaded, striped, chequered, cloudy or speckled."""
    other = np.clip(colour + rng.uniform(-55, 55) + rng.uniform(-12, 12, 3), 0, 255)
    kind = rng.randint(6)
    if kind == 0:
        mix = np.zeros((height, width), np.float32)
    elif kind == 4:
        mix = _clouds(rng, height, width, rng.randint(3, 9))
    elif kind == 5:
        mix = rng.rand(height, width).astype(np.float32)
    else:
        y, x = np.mgrid[:height, :width].astype(np.float32)
        angle = rng.uniform(0, math.pi)
        u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
        if kind == 1:
            mix = (u - u.min()) / max(float(np.ptp(u)), 1.0)
        else:
            period = rng.uniform(4, 16)
            mix = np.floor(u / period) % 2
            if kind == 3:
                mix = (mix + np.floor(v / period)) % 2
    return (colour + (other - colour) * mix[..., None]).astype(np.float32)


def _clouds(rng: np.random.RandomState, height: int, width: int, cells: int) -> np.ndarray:
    """(H, W) float32 in [0, 1]: random values on a cells x cells grid, smoothly enlarged."""
    grid = Image.fromarray(rng.rand(cells, cells).astype(np.float32))
    return np.clip(np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)
