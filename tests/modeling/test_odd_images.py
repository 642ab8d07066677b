"""Images that no benchmark holds: tiny, one pixel wide, very long, without objects, all in a batch."""

import pytest
import torch

from .tiny import METHODS, sample, tiny_model

# RT-DETR as published has batch norms in its neck, which cannot train on a single cell.
CONFIGS = [config for config in METHODS if config != "rt_detr/rt_detr_r50_72ep"]
ODD = {
    "fewer tokens than queries": [(5, 7, 2)],
    "one pixel": [(1, 1, 1)],
    "one pixel wide": [(64, 1, 2)],
    "one to fifty": [(20, 1000, 3)],
    "no objects": [(40, 48, 0)],
    "all together": [(5, 7, 2), (64, 1, 2), (4, 200, 3), (40, 48, 0), (48, 40, 12)],
}


@pytest.mark.parametrize("config", CONFIGS)
def test_odd_images_train_and_evaluate(config):
    model = tiny_model(config)
    for name, images in ODD.items():
        batch = [sample(h, w, n, seed=i) for i, (h, w, n) in enumerate(images)]
        model.train().zero_grad()
        losses = model(batch)
        total = sum(losses.values())
        assert total.isfinite(), (name, losses)
        total.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients), name

        model.eval()
        with torch.no_grad():
            results = model(batch)
        for (height, width, _), result in zip(images, results, strict=True):
            found = result["instances"]
            assert found.image_size == (height, width), name
            boxes = found.pred_boxes.tensor
            assert boxes.isfinite().all() and found.scores.isfinite().all(), name
            assert (boxes >= 0).all() and (boxes <= boxes.new_tensor([width, height] * 2)).all()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_image_that_is_not_finite_is_named_and_the_others_keep_their_detections(value, caplog):
    model = tiny_model("sparse_detr/sparse_detr_r50_30_50ep").eval()
    first, last = ({**sample(*size), "file_name": "sound.tif"} for size in ((64, 96), (96, 64)))
    broken = {**sample(80, 80), "file_name": "broken.tif", "image_id": 7}
    with torch.no_grad():
        expected = [model([image])[0]["instances"] for image in (first, last)]
        black = {**broken, "image": torch.zeros(3, 80, 80)}
        batch_before = [result["instances"] for result in model([first, black, last])]
        broken["image"][0, 3, 5] = float(value)
        found = [result["instances"] for result in model([first, broken, last])]
    assert [len(f) for f in found] == [len(expected[0]), 0, len(expected[1])]
    for index in (0, 2):
        assert torch.equal(found[index].scores, batch_before[index].scores)
        assert torch.equal(found[index].pred_boxes.tensor, batch_before[index].pred_boxes.tensor)
    (record,) = caplog.records
    assert "image 7 (broken.tif): its pixels are not finite" in record.message


def test_weights_that_are_not_finite_are_an_error():
    model = tiny_model("sparse_detr/sparse_detr_r50_30_50ep").eval()
    model.transformer.level_embed.data.fill_(float("nan"))
    with torch.no_grad(), pytest.raises(FloatingPointError, match=r"\(transformer.level_embed"):
        model([sample(64, 64)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_cast_to_half_precision_says_what_to_use(dtype):
    model = tiny_model("dino/dino_r50_4scale_12ep").eval().to(dtype)
    with torch.no_grad(), pytest.raises(ValueError, match=r"Predictor\(..., dtype=torch.bfloat16\)"):
        model([sample(64, 64)])
