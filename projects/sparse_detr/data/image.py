"""The one way in which images are read: by the data check, training, evaluation and the tools."""

import os

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UserError

# Of the files in a folder that are taken for images.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_EXIF_ORIENTATION, _EXIF_TRANSPOSED = 0x0112, (5, 6, 7, 8)


class ImageError(UserError, OSError):
    """An image that cannot be read as it must be.

    Attributes:
        problem: what is wrong with it.
        advice: what to do.
    """

    def __init__(self, problem: str, advice: str = "", path: str | os.PathLike | None = None) -> None:
        super().__init__(f"cannot read {path}: {problem}; {advice}" if path else problem)
        self.problem, self.advice = problem, advice


def read_image(path: str | os.PathLike, image_format: str = "RGB") -> np.ndarray:
    """(H, W, 3) uint8 in the order ``image_format``, "RGB" or "BGR", turned as the camera noted.

    Raises:
        ImageError: it is no image, is damaged, has more than 8 bits per channel or colours that
            have no RGB values, or more pixels than Pillow reads.
    """
    image = _open(path)
    try:
        with image:
            turned = _apply_exif_orientation(image)
            return np.ascontiguousarray(convert_PIL_to_numpy(turned, image_format))
    except Exception as error:  # Pillow's own and those of its format plug-ins
        raise _damaged(error, path) from error


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height of what ``read_image`` returns; reads the header only.

    Raises:
        ImageError: see ``read_image``; damage after the header stays unseen.
    """
    with _open(path) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TRANSPOSED
        except Exception:  # detectron2 then leaves the image as it is
            turned = False
        return (height, width) if turned else (width, height)


def _open(path: str | os.PathLike) -> Image.Image:
    try:
        image = Image.open(PathManager.get_local_path(os.fspath(path)))
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(
            f"more than {limit} pixels, the most that Pillow reads",
            "cut it into tiles, each an image of its own with its own boxes",
            path,
        ) from None
    except Exception as error:
        raise _damaged(error, path) from error
    if image.mode[0] in "IF":  # "I", "I;16", "F": Pillow would clip their values at 255
        problem = f"more than 8 bits per channel (Pillow's mode {image.mode}), which would be clipped at 255"
        advice = "scale its values to 0..255 and save it with 8 bits"
    elif not _has_rgb(image.mode):
        problem = f"colours of the kind {image.mode}, which Pillow cannot convert to RGB"
        advice = "save it as RGB"
    else:
        return image
    image.close()
    raise ImageError(problem, advice, path)


def _has_rgb(mode: str) -> bool:
    try:
        Image.new(mode, (1, 1)).convert("RGB")
    except ValueError:
        return False
    return True


def _damaged(error: Exception, path: str | os.PathLike) -> ImageError:
    return ImageError(
        getattr(error, "strerror", None) or str(error) or type(error).__name__, "replace the file", path
    )
