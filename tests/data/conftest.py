"""What tests of the training data start from."""

import numpy as np
import pytest
from PIL import Image

HEIGHT, WIDTH = 60, 80


@pytest.fixture
def record(tmp_path):
    """An 80 x 60 image: red left half, blue right half."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2, 0] = 255
    pixels[:, WIDTH // 2 :, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return {"file_name": str(tmp_path / "a.png"), "height": HEIGHT, "width": WIDTH, "image_id": 7}
