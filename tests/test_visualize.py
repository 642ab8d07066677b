"""Pictures of ground truth and detections."""

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances

from sparse_detr.visualize import draw_detections, draw_ground_truth, side_by_side

IMAGE = np.full((40, 60, 3), 200, np.uint8)
METADATA = Metadata(thing_classes=["cat", "dog"])


def changed(picture):
    """Box around the pixels that differ from the plain image: x0, y0, x1, y1."""
    rows, columns = np.nonzero((picture != 200).any(-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_detections_below_the_threshold_are_not_drawn():
    image = np.full((240, 320, 3), 200, np.uint8)
    found = Instances((240, 320))
    found.pred_boxes = Boxes(torch.tensor([[10.0, 10, 60, 60], [200, 160, 300, 220]]))
    found.scores = torch.tensor([0.2, 0.1])
    found.pred_classes = torch.tensor([0, 1])
    assert (draw_detections(image, found, METADATA, threshold=0.5) == image).all()
    x0, y0, x1, y1 = changed(draw_detections(image, found, METADATA, threshold=0.15))
    assert x0 <= 10 and y0 <= 10 and 58 <= x1 < 200 and 58 <= y1 < 160  # the first box alone
    x0, y0, x1, y1 = changed(draw_detections(image, found, METADATA, threshold=0.0))
    assert x0 <= 10 and y0 <= 10 and x1 >= 298 and y1 >= 218


def test_ground_truth_is_drawn_where_it_is():
    record = {"annotations": [{"bbox": [10, 12, 20, 16], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}]}
    picture = draw_ground_truth(IMAGE, record, METADATA, scale=2)
    assert picture.shape == (80, 120, 3)
    x0, y0, x1, y1 = changed(picture)
    assert abs(x0 - 20) <= 4 and abs(y0 - 24) <= 4 and x1 >= 56 and y1 >= 52


def test_annotations_with_and_without_masks_are_drawn_by_their_boxes():
    """As annotation tools export rectangles beside polygons."""
    box = {"bbox": [10, 12, 20, 16], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    mask = {**box, "segmentation": [[10, 12, 30, 12, 30, 28]], "keypoints": [11, 13, 2]}
    both = draw_ground_truth(IMAGE, {"annotations": [mask, box]}, METADATA)
    assert (both != IMAGE).any()
    assert (draw_ground_truth(IMAGE, {"file_name": "no annotations"}, METADATA) == IMAGE).all()


def test_pictures_of_unlike_heights_stand_side_by_side():
    row = side_by_side([IMAGE, IMAGE[:10, :10]], gap=2)
    assert row.shape == (40, 72, 3) and (row[20, 65] == 255).all() and (row[:, 60:62] == 255).all()
