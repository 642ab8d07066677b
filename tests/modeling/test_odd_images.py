"""Images that no benchmark holds: tiny, one pixel wide, very long, without objects, all in a batch."""

import pytest
import torch

from .tiny import sample, tiny_model

CONFIGS = (
    "deformable_detr/deformable_detr_r50_50ep",
    "deformable_detr/deformable_detr_r50_two_stage_50ep",
    "dino/dino_r50_4scale_12ep",
    "h_deformable_detr/h_deformable_detr_r50_12ep",
    "sparse_detr/sparse_detr_r50_30_50ep",
    "focus_detr/focus_detr_r50_4scale_12ep",
    "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep",
)
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
