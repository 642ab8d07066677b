"""From the decoder's output to detections: no threshold, no NMS (Deformable DETR, App. A.4)."""

from __future__ import annotations

from detectron2.structures import Boxes, Instances
from torch import Tensor

from .boxes import cxcywh_to_xyxy
from .layers import at_least_float32, tensor_like


def top_detections(logits: Tensor, boxes: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` best (query, class) pairs; a query may appear with several classes.

    Args:
        logits: (B, Q, num_classes); boxes: (B, Q, 4) cxcywh.

    Returns:
        scores (B, k) descending, classes (B, k), boxes (B, k, 4) xyxy in the unit of ``boxes``;
        k shrinks to Q * num_classes where there are fewer pairs.
    """
    num_classes = logits.shape[-1]
    pairs = at_least_float32(logits).sigmoid().flatten(1)  # (B, Q * num_classes)
    scores, index = pairs.topk(min(k, pairs.shape[1]), dim=1)
    query = index // num_classes  # (B, k)
    boxes = cxcywh_to_xyxy(boxes).gather(1, query[..., None].expand(-1, -1, 4))
    return scores, index % num_classes, boxes


def detections(logits: Tensor, boxes: Tensor, sizes: list[tuple[int, int]], k: int) -> list[Instances]:
    """``top_detections`` as detectron2 Instances in pixels of the network input.

    Args:
        sizes: (height, width) of each unpadded network input.
    """
    results = []
    for size, score, label, box in zip(sizes, *top_detections(logits, boxes, k)):
        height, width = size
        result = Instances(size)
        result.pred_boxes = Boxes(box * tensor_like([width, height, width, height], box))
        result.scores = score
        result.pred_classes = label
        results.append(result)
    return results
