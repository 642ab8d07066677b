"""Pictures: ground truth, detections, and which tokens the encoder kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from torch import nn


def draw_detections(
    image: np.ndarray,
    instances: Instances,
    metadata: Metadata,
    *,
    threshold: float = 0.5,
    scale: float = 1.0,
) -> np.ndarray:
    """Boxes, class names and scores of the detections that score at least ``threshold``.

    Args:
        image: (H, W, 3) uint8 RGB, of the size that the instances' boxes refer to.
        metadata: of the data set; ``thing_classes`` gives the names.
        scale: enlarges the picture.

    Returns:
        (scale * H, scale * W, 3) uint8 RGB.
    """
    instances = instances.to("cpu")
    instances = instances[instances.scores >= threshold]
    return Visualizer(image, metadata, scale).draw_instance_predictions(instances).get_image()


def draw_ground_truth(
    image: np.ndarray, record: dict, metadata: Metadata, *, scale: float = 1.0
) -> np.ndarray:
    """The annotations of a detectron2 dataset dict; see ``draw_detections``."""
    return Visualizer(image, metadata, scale).draw_dataset_dict(record).get_image()


def draw_input(
    entry: dict, metadata: Metadata, image_format: str = "RGB", *, scale: float = 1.0
) -> np.ndarray:
    """An image as the training loader delivers it, with its boxes; see ``draw_detections``.

    Args:
        entry: the mapper's result: ``image`` (3, H, W) and ``instances`` with ``gt_boxes`` (xyxy
            pixels) and ``gt_classes``.
        image_format: channel order of ``image``, "RGB" or "BGR".
    """
    image = entry["image"].permute(1, 2, 0).numpy()  # (H, W, 3)
    if image_format == "BGR":
        image = image[:, :, ::-1]
    instances = entry["instances"]
    names = metadata.get("thing_classes")
    classes = instances.gt_classes.tolist()
    labels = [names[k] if names else str(k) for k in classes]
    drawing = Visualizer(np.ascontiguousarray(image), metadata, scale)
    return drawing.overlay_instances(boxes=instances.gt_boxes, labels=labels).get_image()


def draw_kept_tokens(
    image: np.ndarray,
    selected: torch.Tensor,
    shapes: Sequence[tuple[int, int]],
    *,
    scale: float = 1.0,
) -> np.ndarray:
    """An image that was alone in its batch, the darker the fewer levels keep a token there.

    Args:
        image: (H, W, 3) uint8 RGB, in any resolution.
        selected: (K,) indices of the kept tokens among those of all levels, finest level first.
        shapes: (H_l, W_l) of every level.
        scale: enlarges the picture.

    Returns:
        (scale * H, scale * W, 3) uint8 RGB.
    """
    height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
    kept = torch.zeros(sum(h * w for h, w in shapes))  # (N,)
    kept[selected.cpu()] = 1
    rows, columns = ((np.arange(n) + 0.5) / n for n in (height, width))  # pixel centres in [0, 1]
    light = np.zeros((height, width))
    for level, (h, w) in zip(kept.split([h * w for h, w in shapes]), shapes, strict=True):
        cells = level.view(h, w).numpy()
        light += cells[(rows * h).astype(int)[:, None], (columns * w).astype(int)[None]]
    light = 0.15 + 0.85 * light / len(shapes)
    enlarged = np.asarray(Image.fromarray(image).resize((width, height), Image.BILINEAR))
    return (enlarged * light[..., None]).astype(np.uint8)


@torch.no_grad()
def draw_example(
    model: nn.Module,
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
    outputs = []
    handle = model.transformer.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        instances = model([entry])[0]["instances"]
    finally:
        handle.remove()
    pictures = [
        draw_ground_truth(image, record, metadata, scale=scale),
        draw_detections(image, instances, metadata, threshold=threshold, scale=scale),
    ]
    encoded, shapes = outputs[0].encoded, outputs[0].tokens.shapes
    if encoded.selected is not None:
        pictures.append(draw_kept_tokens(image, encoded.selected[0], shapes, scale=scale))
    return side_by_side(pictures)


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 6) -> np.ndarray:
    """Joins (H_i, W_i, 3) uint8 pictures in a row, white between and below them."""
    height = max(p.shape[0] for p in pictures)
    padded = [
        np.pad(
            p,
            ((0, height - p.shape[0]), (0, gap * (i < len(pictures) - 1)), (0, 0)),
            constant_values=255,
        )
        for i, p in enumerate(pictures)
    ]
    return np.concatenate(padded, axis=1)
