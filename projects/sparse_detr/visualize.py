"""Pictures of images: ground truth and detections. ``overlays`` has those of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer


def readable_scale(height: int, width: int, side: int = 400) -> int:
    """How much to enlarge an image, so that its labels do not cover its objects: to ``side`` or more."""
    return max(1, -(-side // min(height, width)))


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
    """The boxes of a detectron2 dataset dict, crowd regions included; see ``draw_detections``."""
    # Without masks: detectron2 expects one in every annotation or in none.
    shown = ("bbox", "bbox_mode", "category_id", "iscrowd")
    boxes = [{k: a[k] for k in shown if k in a} for a in record.get("annotations", ())]
    return Visualizer(image, metadata, scale).draw_dataset_dict({"annotations": boxes}).get_image()


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
