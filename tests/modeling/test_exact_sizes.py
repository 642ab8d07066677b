"""Exact sizes: tokens know where they are, and an image's result does not depend on its batch."""

import pytest
import torch
from detectron2.config import instantiate

from sparse_detr import build_model

from .test_composition import BASES, ENCODERS, composed
from .tiny import reveal, sample, shrink, tiny_model

SIZES = ((150, 200), (171, 130), (224, 96))  # (height, width), no multiples of a stride
SMALL = [
    "model.num_classes=3",
    "model.transformer.encoder.num_layers=1",
    "model.transformer.decoder.num_layers=1",
]


def exact(config, **settings):
    config.exact_sizes = True
    config.update(settings)
    torch.manual_seed(0)
    return reveal(instantiate(config)).double().eval()


def images(sizes=SIZES):
    return [sample(*size, annotated=False, seed=seed) for seed, size in enumerate(sizes)]


@torch.no_grad()
def detect(model, batch):
    return model.detect(model.preprocess(batch))


def assert_alone_as_in_a_batch(model, batch):
    together = detect(model, batch)
    for image, entry in enumerate(batch):
        alone = detect(model, [entry])
        valid = ~together.tokens.mask[image]
        # Sums of double precision numbers of size 1 to 10, in another order.
        for found, wanted in (
            (together.encoded.memory[image, valid], alone.encoded.memory[0, ~alone.tokens.mask[0]]),
            (together.logits[image], alone.logits[0]),
            (together.boxes[image], alone.boxes[0]),
        ):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("base", BASES)
def test_an_image_is_detected_alone_as_in_any_batch(base, encoder):
    model = exact(shrink(composed(base, encoder)))
    assert_alone_as_in_a_batch(model, images())
    assert_alone_as_in_a_batch(model, images(SIZES[:2]))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deformable_detr/deformable_detr_r50_50ep", {}),
        ("deformable_detr/deformable_detr_r50_refine_50ep", {}),
        ("deformable_detr/deformable_detr_r50_two_stage_50ep", {"size_divisibility": 32}),
        ("dino/dino_official_r50_4scale_12ep", {}),
        ("salience_detr/salience_detr_r50_4scale_12ep", {}),
    ],
)
def test_other_models_too(name, settings):
    from sparse_detr import get_config

    assert_alone_as_in_a_batch(exact(shrink(get_config(name).model), **settings), images())


def test_published_sizes_depend_on_the_batch():
    model = tiny_model("deformable_detr/deformable_detr_r50_two_stage_50ep").double().eval()
    batch = images()
    together, alone = detect(model, batch), detect(model, batch[1:2])
    assert (together.boxes[1] - alone.boxes[0]).abs().max() > 1e-3


@pytest.mark.parametrize("pad_features", [True, False])
def test_tokens_are_where_their_cells_are(pad_features):
    """On every level, alone and in a batch: at the pixels of the cell's centre."""
    from sparse_detr import get_config

    config = shrink(get_config("deformable_detr/deformable_detr_r50_two_stage_50ep").model)
    model = exact(config, pad_features=pad_features)
    for batch in (images(), images(SIZES[1:2])):
        tokens = detect(model, batch).tokens
        for image, entry in enumerate(batch):
            size = torch.tensor([entry["width"], entry["height"]]).double()
            for level, stride in enumerate(model.strides):
                start = tokens.level_starts[level]
                row = slice(start, start + int(tokens.valid_cells[image, level, 0]))
                centres = (torch.arange(row.stop - row.start) + 0.5) * stride
                torch.testing.assert_close(tokens.centres[image, row, 0] * size[0], centres.double())
                for on, (other, (_, cells)) in enumerate(zip(model.strides, tokens.shapes)):
                    at = tokens.reference_points[image, row, on, 0] * cells * other
                    torch.testing.assert_close(at, centres.double())
                # The proposal's box is around the same centre, in [0, 1] of the image.
                box = tokens.proposals[image, row].sigmoid()
                known = ~tokens.unproposed[image, row]
                torch.testing.assert_close(box[known, 0] * size[0], centres.double()[known])


@pytest.mark.parametrize(
    "name",
    [
        "deformable_detr/deformable_detr_r50_two_stage_50ep",
        "deformable_detr/deformable_detr_swint_efficient_50ep",
        "dino/dino_r50_5scale_12ep",
    ],
)
def test_maps_have_one_cell_for_every_started_stride(name):
    """What exact sizes rest on, for each kind of backbone and number of levels."""
    model = build_model(name, overrides=SMALL)
    height, width = 97, 130
    maps = model.backbone(torch.zeros(1, 3, height, width))
    maps = model.neck([maps[feature] for feature in model.in_features])
    assert [m.shape[-2:] for m in maps] == [(-(-height // s), -(-width // s)) for s in model.strides]


def test_dilation_keeps_the_stride():
    from sparse_detr.modeling import build_dilated_resnet

    backbone = build_dilated_resnet()
    (m,) = backbone(torch.zeros(1, 3, 97, 130)).values()
    stride = backbone.output_shape()["res5"].stride
    assert m.shape[-2:] == (-(-97 // stride), -(-130 // stride))


def test_a_batch_norm_cannot_see_each_image_alone():
    from sparse_detr import get_config

    config = shrink(get_config("deformable_detr/deformable_detr_r50_two_stage_50ep").model)
    config.backbone.stem.norm = "BN"
    with pytest.raises(ValueError, match="model.pad_features"):
        exact(config)
    exact(config, pad_features=False)
