"""The DETR family's augmentation, as augmentations for detectron2's own ``DatasetMapper``.

``DatasetMapper`` already does what these detectors need: it keeps images without objects, leaves
out crowd regions, clips boxes to the image and drops those that become empty. What it lacks is the
published recipe (Deformable DETR, ``make_coco_transforms``; the same in
DINO and Focus-DETR): with equal chance either a multi-scale resize, or a resize, a random crop and
then that multi-scale resize.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import check_image_size
from detectron2.structures import BoxMode

from .image import ImageError, read_image
from .loader import seed_everything


class RandomEither(T.Augmentation):
    """Applies the augmentations ``first`` with probability ``prob``, else those of ``second``."""

    def __init__(
        self, first: Sequence[T.Augmentation], second: Sequence[T.Augmentation], prob: float = 0.5
    ) -> None:
        super().__init__()
        self.first = T.AugmentationList(list(first))
        self.second = T.AugmentationList(list(second))
        self.prob = prob

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        return (self.first if self._rand_range() < self.prob else self.second)(aug_input)

    def __repr__(self) -> str:
        return f"RandomEither({self.first}, {self.second}, prob={self.prob})"


class OncePerBatch(T.Augmentation):
    """``augmentation``, drawn alike for all images of a training batch, over all processes.

    ``TrainingDataset`` gives the images of a batch one seed, which the mapper passes on as
    ``AugInput.batch_seed``; elsewhere each image draws for itself.
    """

    def __init__(self, augmentation: T.Augmentation) -> None:
        super().__init__()
        self.augmentation = augmentation

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        seed = getattr(aug_input, "batch_seed", None)
        if seed is None:
            return self.augmentation(aug_input)
        behind = np.random.randint(2**31)  # what comes behind it is each image's own again
        seed_everything(*seed)
        transform = self.augmentation(aug_input)
        seed_everything(behind)
        return transform

    def __repr__(self) -> str:
        return f"OncePerBatch({self.augmentation})"


def train_augmentations(
    *,
    short_edges: Sequence[int] = tuple(range(480, 801, 32)),
    max_size: int = 1333,
    pre_crop_short_edges: Sequence[int] = (400, 500, 600),
    crop_size: tuple[int, int] = (384, 600),
    crop_prob: float = 0.5,
    flip_prob: float = 0.5,
) -> list[T.Augmentation]:
    """Flip, then either a resize or resize-crop-resize; all sizes in pixels.

    Args:
        short_edges: one of these becomes the image's shorter side ...
        max_size: ... unless the longer side would exceed this.
        pre_crop_short_edges: sizes of the first resize of the crop branch (no limit on the longer
            side).
        crop_size: width and height of the crop are drawn independently from this closed range, cut
            to the image.
        crop_prob: probability of the crop branch; 0 switches it off.
        flip_prob: probability of the horizontal flip.
    """

    resize = T.ResizeShortestEdge(list(short_edges), max_size, sample_style="choice")
    pre_crop_resize = T.ResizeShortestEdge(list(pre_crop_short_edges), sample_style="choice")
    crop = T.RandomCrop("absolute_range", tuple(crop_size))
    return [
        T.RandomFlip(flip_prob),
        RandomEither([pre_crop_resize, crop, resize], [resize], crop_prob),
    ]


def test_augmentations(*, short_edge: int = 800, max_size: int = 1333) -> list[T.Augmentation]:
    """Resizes the shorter side to ``short_edge`` pixels, the longer one at most ``max_size``."""
    return [T.ResizeShortestEdge(short_edge, max_size)]


class DetrDatasetMapper(DatasetMapper):
    """``DatasetMapper`` for boxes alone: every training image has ``instances``, be they none.

    detectron2's mapper returns no ``instances`` at all for a record without the key "annotations".
    ``image_format`` is the channel order that the model's backbone expects, "RGB" or "BGR".
    """

    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation],
        image_format: str = "RGB",
    ) -> None:
        super().__init__(is_train, augmentations=list(augmentations), image_format=image_format)

    def __call__(self, dataset_dict: dict) -> dict:
        """Adds ``image``, (3, H, W) uint8, and in training ``instances`` with absolute boxes.

        Raises:
            ImageError: the file cannot be read.
        """
        entry = copy.deepcopy(dataset_dict)
        try:
            image = read_image(entry["file_name"], self.image_format)
        except ImageError as error:
            if self.is_train:  # the training set names the image, whatever failed
                raise
            raise ImageError(
                f"cannot read image {entry.get('image_id')} ({entry.get('file_name')}): {error.problem}; "
                f"{error.advice}, or take the image out of the annotation file"
            ) from error
        check_image_size(entry, image)
        annotations = entry.pop("annotations", [])
        augmented = T.AugInput(image, boxes=_boxes(annotations) if self.is_train else None)
        augmented.batch_seed = entry.pop("batch_seed", None)
        transforms = self.augmentations(augmented)
        image = augmented.image
        entry["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.is_train:
            entry["annotations"] = annotations
            self._transform_annotations(entry, transforms, image.shape[:2])
        return entry


def _boxes(annotations: Sequence[dict]) -> np.ndarray:
    """(N, 4) xyxy in pixels of the objects that training sees."""
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in annotations
        if not a.get("iscrowd", 0)
    ]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
