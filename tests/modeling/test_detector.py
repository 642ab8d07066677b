"""The detector as detectron2 sees it: images in, losses or Instances out."""

import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from sparse_detr.config import get_config, list_configs
from sparse_detr.modeling.heads import DetectionHeads
from sparse_detr.modeling.tokens import gather_tokens
from sparse_detr.yacs import add_sparse_detr_config

from .tiny import reveal, sample, shrink, tiny_model, total_losses

VARIANTS = [
    "deformable_detr_r50_50ep",
    "deformable_detr_r50_refine_50ep",
    "deformable_detr_r50_two_stage_50ep",
    "deformable_detr_r50_efficient_50ep",
]
VARIANTS = [f"deformable_detr/{name}" for name in VARIANTS]


@pytest.mark.parametrize("config", VARIANTS)
def test_a_training_step_reaches_every_trained_parameter(config):
    model = tiny_model(config).train()
    batch = [sample(70, 90, seed=1), sample(64, 120, num_boxes=3, seed=2)]
    # The last layers of the box heads start at zero and hide what is behind them.
    for head in model.transformer.heads.box_heads:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    for attention in (m for m in model.modules() if hasattr(m, "attention_weights")):
        torch.nn.init.normal_(attention.attention_weights.weight, std=0.1)
    losses = model(batch)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    suffixes = {"", "_0"} | ({"_enc"} if "two_stage" in config or "efficient" in config else set())
    assert set(losses) == {f"loss_{k}{s}" for k in ("class", "bbox", "giou") for s in suffixes}


@pytest.mark.parametrize(
    "config", [*VARIANTS, "dino/dino_r50_4scale_12ep", "sparse_detr/sparse_detr_r50_30_50ep"]
)
def test_all_layers_start_from_the_same_heads(config):
    groups = [m for m in tiny_model(config).modules() if isinstance(m, DetectionHeads)]
    for heads in groups:
        for kind in (heads.class_heads, heads.box_heads):
            first = dict(kind[0].named_parameters())
            for name, parameter in (x for head in kind[1:] for x in head.named_parameters()):
                if not name.endswith(f"{len(heads.box_heads[0].layers) - 1}.bias"):  # sizes: the first only
                    assert torch.equal(parameter, first[name]), name
    assert any(len(heads.class_heads) > 1 for heads in groups) or config == VARIANTS[0]


@pytest.mark.parametrize("config", VARIANTS)
def test_a_few_steps_on_one_image_reduce_the_loss(config):
    totals = total_losses(tiny_model(config).train(), [sample(64, 64)], steps=12, lr=1e-3)
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize("config", [name for name in VARIANTS if "two_stage" in name or "efficient" in name])
def test_inference_boxes_only_the_tokens_that_become_queries(config):
    model = reveal(tiny_model(config)).double()
    images = model.preprocess([sample(70, 90)])
    with torch.no_grad():
        every, chosen = (model.train(training).detect(images) for training in (True, False))
    selected = chosen.proposals.selected
    assert torch.equal(selected, every.proposals.selected)
    assert every.proposals.boxes.shape[1] > chosen.proposals.boxes.shape[1] == selected.shape[1]
    for name in ("boxes", "logits"):
        expected = gather_tokens(getattr(every.proposals, name), selected)
        torch.testing.assert_close(getattr(chosen.proposals, name), expected)
    torch.testing.assert_close(chosen.boxes, every.boxes)


def test_inference_returns_instances_in_output_pixels():
    model = tiny_model().eval()
    entry = sample(64, 96, annotated=False)
    entry.update(height=128, width=192)  # twice the network input
    with torch.no_grad():
        (small,) = model([sample(64, 96, annotated=False)])
        (large,) = model([entry])
    large, small = large["instances"], small["instances"]
    assert large.image_size == (128, 192)
    assert len(large) <= model.max_detections
    assert (large.scores.diff() <= 0).all() and large.pred_classes.max() < model.num_classes
    torch.testing.assert_close(large.pred_boxes.tensor, 2 * small.pred_boxes.tensor)


@pytest.mark.parametrize("config", VARIANTS)
def test_padding_does_not_change_what_is_detected(config):
    """The encoder, the proposals and the decoder see an image alone as they see it in a batch.

    Only the neck's GroupNorm averages over the padding, as published, so the test starts behind it;
    and the published ranking of proposals has the padding in it, unless it is skipped.
    """
    transformer = tiny_model(config).double().eval().transformer
    transformer.query_selection.skip_invalid = True
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 16), (6, 8), (3, 4), (2, 2))
    maps = [torch.randn(1, 32, h, w, generator=generator, dtype=torch.double) for h, w in shapes]
    masks = [torch.zeros(1, h, w, dtype=torch.bool) for h, w in shapes]
    alone = transformer(maps, masks, has_padding=False)
    padded_maps, padded_masks = [], []
    for m in maps:
        h, w = m.shape[-2:]
        larger = torch.randn(1, 32, h + 3, 2 * w, generator=generator, dtype=torch.double)
        larger[:, :, :h, :w] = m
        mask = torch.ones(1, h + 3, 2 * w, dtype=torch.bool)
        mask[:, :h, :w] = False
        padded_maps.append(larger)
        padded_masks.append(mask)
    padded = transformer(padded_maps, padded_masks)
    torch.testing.assert_close(padded.logits, alone.logits)
    torch.testing.assert_close(padded.boxes, alone.boxes)


def test_detections_follow_the_order_of_the_images():
    model = tiny_model(VARIANTS[2]).eval()
    batch = [sample(64, 96, seed=i, annotated=False) for i in range(3)]
    with torch.no_grad():
        forward = [r["instances"].scores for r in model(batch)]
        backward = [r["instances"].scores for r in model(batch[::-1])][::-1]
    for a, b in zip(forward, backward):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("size", [(33, 200), (16, 16), (1, 40)])
def test_images_smaller_than_the_query_count_train_and_evaluate(config, size):
    model = tiny_model(config)
    model.train()
    losses = model([sample(*size, num_boxes=1)])
    assert all(v.isfinite() for v in losses.values())
    model.eval()
    with torch.no_grad():
        (result,) = model([sample(*size, annotated=False)])
    assert result["instances"].pred_boxes.tensor.isfinite().all()


def test_batches_with_and_without_objects():
    model = tiny_model(VARIANTS[3]).train()
    empty = sample(64, 64, num_boxes=0)
    for batch in ([empty], [empty, sample(64, 80)]):
        losses = model(batch)
        assert all(v.isfinite() for v in losses.values())
        sum(losses.values()).backward()


def test_training_without_annotations_is_refused():
    with pytest.raises(ValueError, match="no 'instances' for image0.jpg"):
        tiny_model().train()([sample(64, 64, annotated=False)])


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_that_the_model_does_not_have_is_named(label):
    entry = sample(64, 64)
    entry["instances"].gt_classes[1] = label
    with pytest.raises(ValueError, match=f"image0.jpg has an object of class {label}, .* has 3 classes"):
        tiny_model().train()([entry])


def test_nothing_is_rounded_up_to_the_backbone_stride():
    model = tiny_model()
    images = model.preprocess([sample(50, 61, annotated=False), sample(47, 77, annotated=False)])
    assert isinstance(images, ImageList) and images.tensor.shape[-2:] == (50, 77)


def test_two_stage_without_refinement_needs_shared_heads():
    model = shrink(get_config(VARIANTS[2]).model)
    model.transformer.decoder.refine = False
    with pytest.raises(ValueError, match="share_proposal_heads=True"):
        instantiate(model)


def test_bfloat16_autocast_trains():
    model = tiny_model(VARIANTS[3]).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([sample(64, 80)])
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize("name", list_configs())
def test_every_shipped_config_builds_when_shrunk(name):
    cfg = get_config(name)
    assert {"model", "train", "optimizer", "lr_multiplier", "dataloader"} <= set(cfg)
    with EventStorage():
        instantiate(shrink(cfg.model)).train()([sample(64, 64)])


@pytest.mark.parametrize("name", ["DeformableDETR", "DINO", "SparseDETR", "FocusDETR", "LiteDETR"])
def test_yacs_users_get_the_same_model(name):
    cls = META_ARCH_REGISTRY.get(name)
    cfg = get_cfg()
    add_sparse_detr_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SPARSE_DETR.NUM_CLASSES = 7
    cfg.MODEL.SPARSE_DETR.OVERRIDES = [
        "model.transformer.decoder.num_layers=1",
        "model.transformer.encoder.num_layers=6",
    ]
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    model = build_model(cfg)
    assert isinstance(model, cls)
    assert model.num_classes == 7 and model.max_detections == 20
    assert len(model.transformer.decoder.layers) == 1
    assert model.transformer.heads.class_heads[0].out_features == 7


def test_yacs_config_without_the_section_is_refused():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "DeformableDETR"
    with pytest.raises(ValueError, match="add_sparse_detr_config"):
        build_model(cfg)
