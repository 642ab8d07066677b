"""One way to read an image: the same pixels, or the same refusal, for check, training and tools."""

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image

from sparse_detr.data import DetrDatasetMapper, ImageError, read_image
from sparse_detr.data.image import image_size
from sparse_detr.errors import UserError


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def test_pixels_come_in_the_order_asked_for(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == pixels).all()
    assert (read_image(str(tmp_path / "a.png"), "BGR") == pixels[:, :, ::-1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_8_bits_are_read_as_detectron2_reads_them(mode, pixels, tmp_path):
    path = str(tmp_path / "a.tif")
    Image.fromarray(pixels).convert("L" if mode == "LA" else "RGB").convert(mode).save(path)
    assert (read_image(path) == detection_utils.read_image(path, "RGB")).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_the_camera_noted(orientation, pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "a.png")
    Image.fromarray(pixels).save(path, exif=exif)
    image = read_image(path)
    assert (image == detection_utils.read_image(path, "RGB")).all()
    assert image_size(path) == image.shape[1::-1] == ((6, 4) if orientation < 5 else (4, 6))


DEEP = {
    "I;16": Image.fromarray(np.full((4, 6), 3000, np.uint16)),
    "I": Image.fromarray(np.full((4, 6), 3000, np.int32)),
    "F": Image.fromarray(np.full((4, 6), 0.5, np.float32)),
}


@pytest.mark.parametrize("mode", DEEP)
@pytest.mark.parametrize("read", [read_image, image_size])
def test_more_than_8_bits_are_refused_everywhere(read, mode, tmp_path):
    """Pillow would clip them: an image of 16 bits would be white, one of 0..1 black."""
    path = tmp_path / "a.tif"
    DEEP[mode].save(path)
    assert Image.open(path).mode == mode
    with pytest.raises(ImageError, match=f"a.tif: more than 8 bits per channel .*{mode}.*scale its values"):
        read(path)
    record = {"file_name": str(path), "image_id": 7, "width": 6, "height": 4}
    with pytest.raises(ImageError, match="more than 8 bits"):
        DetrDatasetMapper(is_train=True, augmentations=[])(record)
    with pytest.raises(OSError, match=r"cannot read image 7 \(.*a.tif\): more than 8 bits"):
        DetrDatasetMapper(is_train=False, augmentations=[])(record)


@pytest.mark.parametrize("read", [read_image, image_size])
def test_more_pixels_than_pillow_reads_are_to_be_tiled(read, pixels, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="more than 20 pixels.*cut it into tiles") as caught:
        read(path)
    assert "replace" not in str(caught.value)


def test_what_is_no_image_is_named(pixels, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match="a.png: .*; replace the file"):
        read_image(path)
    path.write_bytes(b"no picture")
    for read in (read_image, image_size):
        with pytest.raises(UserError, match="a.png: cannot identify .*; replace the file"):
            read(path)
    with pytest.raises(OSError, match="none.png: No such file"):
        read_image(tmp_path / "none.png")
