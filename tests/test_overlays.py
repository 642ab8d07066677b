"""Pictures of tokens: what they show and where, not how they look."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_detr import overlays
from sparse_detr.cli import visualize_tokens as tool

from .modeling.tiny import sample, tiny_model

SPARSE = "sparse_detr/sparse_detr_r50_30_50ep"


@torch.no_grad()
def run(model, batch):
    with overlays.recorded_output(model) as outputs:
        model(batch)
    return outputs[0]


def test_the_recorded_decoder_attention_is_that_of_training():
    model = tiny_model(SPARSE).eval()
    entry = sample(64, 96)
    output = run(model, [entry])
    recorded = overlays.attention_map(output)
    images, targets = model.preprocess([entry]), model.targets([entry])
    trained = model.train().detect(images, targets)
    model.losses(trained, targets)
    torch.testing.assert_close(recorded, trained.encoded.intermediate["attention_map"])
    with torch.no_grad():
        assert not model.eval().detect(images).decoded.samples  # only recorded on request


def test_every_pixel_shows_the_cell_it_lies_in():
    level = np.array([[1, 2, 3], [4, 5, 6]])
    assert overlays.enlarge(level, (4, 6)).tolist() == [
        [1, 1, 2, 2, 3, 3],
        [1, 1, 2, 2, 3, 3],
        [4, 4, 5, 5, 6, 6],
        [4, 4, 5, 5, 6, 6],
    ]


def test_kept_cells_keep_their_colours():
    image = np.full((4, 6, 3), 200, np.uint8)
    picture = overlays.draw_kept(image, [np.array([[True, False]])])
    assert (picture[:, :3] == 200).all() and (picture[:, 3:] == 60).all()


def test_pixels_are_the_brighter_the_more_levels_keep_them():
    image = np.full((40, 60, 3), 200, np.uint8)
    fine, coarse = np.zeros((4, 6), bool), np.zeros((2, 3), bool)
    fine[0, :2], coarse[0, 0] = True, True
    picture = overlays.draw_kept(image, [fine, coarse])
    assert picture[5, 5, 0] == picture[5, 15, 0] == 200  # both lie in the same coarse cell
    assert picture[15, 15, 0] == 130 and picture[35, 55, 0] == 60


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (SPARSE, 3),
        ("deformable_detr/deformable_detr_r50_50ep", 1),
    ],
)
def test_a_sheet_has_a_row_per_quantity_and_a_column_per_level(config, rows):
    output = run(tiny_model(config).eval(), [sample(64, 96, annotated=False)])
    image = np.zeros((32, 48, 3), np.uint8)
    for front, columns in ((None, 4), (image, 5)):
        sheet = overlays.draw_tokens(image, output, detected=front)
        height = rows * (32 + overlays.TITLE_HEIGHT)
        assert sheet.shape == (height, columns * 48 + (columns - 1) * 6, 3)


def test_padding_is_cut_off():
    """A model that pads an image to a multiple of 32 shows the image's own cells."""
    model = tiny_model(SPARSE).eval()
    model.size_divisibility = 32
    output = run(model, [sample(50, 90, annotated=False)])
    assert output.tokens.shapes[0] == (8, 12)
    assert [level.shape for level in overlays.kept_levels(output)][:2] == [(7, 12), (4, 6)]
    sheet = overlays.draw_tokens(np.zeros((32, 48, 3), np.uint8), output)
    assert sheet.shape[0] == 3 * (32 + overlays.TITLE_HEIGHT)


def test_a_batch_is_refused():
    output = run(tiny_model(SPARSE).eval(), [sample(64, 96, annotated=False)] * 2)
    with pytest.raises(ValueError, match="one image: run the images one by one"):
        overlays.draw_tokens(np.zeros((32, 48, 3), np.uint8), output)


def test_the_tool_writes_a_picture(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(
        tmp_path / "noise.png"
    )
    arguments = [
        "--config-file",
        "quick/deformable_detr_shapes",
        "--width",
        "120",
        "--input",
        str(tmp_path / "noise.png"),
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["visualize_tokens.py", *arguments])
    tool.main()
    assert Image.open(tmp_path / "noise_tokens.png").size == (4 * 120 + 3 * 6, 90 + 18)
