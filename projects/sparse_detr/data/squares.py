"""RT-DETR's augmentation: every image becomes a square, so that no batch is padded.

The published recipe is made of torchvision's transforms. Here they draw, and detectron2's apply to the image
and its boxes what they have drawn.
"""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from .mapper import OncePerBatch


class RandomPhotometricDistort(T.Augmentation):
    """torchvision's: brightness, contrast, saturation, hue and the order of channels of an RGB image.

    Args:
        prob: of each of them.
    """

    def __init__(self, prob: float = 0.5) -> None:
        super().__init__()
        self.distort = v2.RandomPhotometricDistort(p=prob)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        drawn = self.distort.make_params([_pixels(image)])
        return T.ColorTransform(
            lambda image: self.distort.transform(_pixels(image), drawn).numpy().transpose(1, 2, 0)
        )


class RandomZoomOut(T.Augmentation):
    """torchvision's: the image somewhere on a black canvas.

    Args:
        side_range: the canvas's sides over the image's.
    """

    def __init__(self, side_range: tuple[float, float] = (1.0, 4.0)) -> None:
        super().__init__()
        self.zoom = v2.RandomZoomOut(side_range=side_range)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        return T.PadTransform(*self.zoom.make_params([_pixels(image)])["padding"], width, height)


class RandomIoUCrop(T.Augmentation):
    """torchvision's (SSD's): a crop that has at least a drawn IoU with some object whose centre is in it.

    Objects whose centre is not in it are lost. An image without objects stays as it is. (detectron2's
    ``MinIoURandomCrop`` demands the IoU of *all* objects, so that it seldom crops where there are several.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.crop = v2.RandomIoUCrop()

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None) -> T.Transform:
        if boxes is None or len(boxes) == 0:
            return T.NoOpTransform()
        objects = BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=image.shape[:2])
        drawn = self.crop.make_params([objects])
        if not drawn:
            return T.NoOpTransform()
        return CropAroundCentres(drawn["left"], drawn["top"], drawn["width"], drawn["height"])


class CropAroundCentres(T.CropTransform):
    """A crop that makes boxes empty whose centre is not inside."""

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        centre = (box[:, :2] + box[:, 2:]) / 2
        start = np.array([self.x0, self.y0])
        inside = (start < centre) & (centre < start + [self.w, self.h])
        return super().apply_box(box) * inside.all(axis=1, keepdims=True)


def _pixels(image: np.ndarray) -> torch.Tensor:
    """(H, W, C) as (C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def square_train_augmentations(
    *,
    size: int = 640,
    sizes: Sequence[int] | None = None,
    color_prob: float = 0.5,
    zoom_out_prob: float = 0.5,
    crop_prob: float = 0.8,
    flip_prob: float = 0.5,
) -> list[T.Augmentation]:
    """RT-DETR's: colours, a smaller picture on black, a crop around objects, a flip and the resize.

    Args:
        size: of the square, in pixels.
        sizes: then one of these, drawn for each batch, by nearest neighbours. (In the published code every
            process draws its own, and neighbours are looked for half a pixel further to the top left.)
        color_prob: of each kind of change to the colours.
        zoom_out_prob, crop_prob, flip_prob: probabilities of the steps.
    """
    augmentations = [
        RandomPhotometricDistort(color_prob),
        T.RandomApply(RandomZoomOut(), zoom_out_prob),
        T.RandomApply(RandomIoUCrop(), crop_prob),
        T.RandomFlip(flip_prob),
        T.Resize((size, size)),
    ]
    if sizes:
        scale = T.ResizeShortestEdge(list(sizes), sample_style="choice", interp=Image.Resampling.NEAREST)
        augmentations.append(OncePerBatch(scale))
    return augmentations


def square_test_augmentations(*, size: int = 640) -> list[T.Augmentation]:
    """Resizes images to squares of ``size`` pixels, whatever their shape."""
    return [T.Resize((size, size))]
