"""The numbers of the training recipes, against what the authors' code and scripts say.

The models' functions are proven by the parity cases; this is about how they are trained.
"""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from sparse_detr.config import config_path, get_config, list_configs, load_config
from sparse_detr.engine import RunLength, build_lr_multiplier, build_optimizer

COCO, COCO_WITH_OBJECTS = 118287, 117266  # training images: all, and with an object not "iscrowd"

# batch, lr, epochs, drops after | images without objects, crops | FFN, dropout, queries |
# position temperature, offset | class weight, detections per image
RECIPES = {
    # fundamentalvision/Deformable-DETR: defaults of main.py, README (batch)
    "deformable_detr/deformable_detr_r50_50ep": (
        32,
        2e-4,
        50,
        [40],
        True,
        0.5,
        1024,
        0.1,
        300,
        10000,
        -0.5,
        2,
        100,
    ),
    "deformable_detr/deformable_detr_r50_two_stage_50ep": (
        32,
        2e-4,
        50,
        [40],
        True,
        0.5,
        1024,
        0.1,
        300,
        10000,
        -0.5,
        2,
        100,
    ),
    # kakaobrain/sparse-detr: defaults of main.py, scale_learning_rate (batch), configs/*.sh
    "deformable_detr/deformable_detr_r50_efficient_50ep": (
        16,
        2e-4,
        50,
        [40],
        True,
        0.5,
        1024,
        0.1,
        300,
        10000,
        -0.5,
        2,
        100,
    ),
    "sparse_detr/sparse_detr_r50_10_50ep": (
        16,
        2e-4,
        50,
        [40],
        True,
        0.5,
        1024,
        0.1,
        300,
        10000,
        -0.5,
        2,
        100,
    ),
    "sparse_detr/sparse_detr_swint_30_50ep": (
        16,
        2e-4,
        50,
        [40],
        True,
        0.5,
        1024,
        0.1,
        300,
        10000,
        -0.5,
        2,
        100,
    ),
    # HDETR/H-Deformable-DETR: *_hybrid_branch_lambda1_group6_t1500_dp0_mqs_lft_*.sh, README
    "h_deformable_detr/h_deformable_detr_r50_12ep": (
        16,
        2e-4,
        12,
        [11],
        True,
        0.5,
        2048,
        0.0,
        300,
        10000,
        -0.5,
        2,
        100,
    ),
    "h_deformable_detr/h_deformable_detr_swint_36ep": (
        16,
        2e-4,
        36,
        [30],
        True,
        0.5,
        2048,
        0.0,
        300,
        10000,
        -0.5,
        2,
        100,
    ),
    # IDEA-Research/detrex: projects/dino/configs, configs/common
    "dino/dino_r50_4scale_12ep": (16, 1e-4, 12, [11], False, 0.5, 2048, 0.0, 900, 10000, -0.5, 1, 300),
    "dino/dino_r50_4scale_24ep": (16, 1e-4, 24, [20], True, 0.5, 2048, 0.0, 900, 20, 0.0, 1, 300),
    "dino/dino_swin_large_384_5scale_36ep": (
        16,
        1e-4,
        36,
        [30],
        False,
        0.5,
        2048,
        0.0,
        900,
        10000,
        -0.5,
        1,
        300,
    ),
    # IDEA-Research/DINO: config/DINO/DINO_4scale.py, scripts/DINO_train_dist.sh
    "dino/dino_official_r50_4scale_12ep": (16, 1e-4, 12, [11], True, 0.5, 2048, 0.0, 900, 20, 0.0, 1, 300),
    # IDEA-Research/Lite-DETR: config/DINO/DINO_4scale.py; the paper for Swin-T
    "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep": (
        16,
        1e-4,
        36,
        [30],
        True,
        0.5,
        2048,
        0.0,
        900,
        20,
        0.0,
        1,
        300,
    ),
    "lite_detr/lite_dino_swint_h3l1_2p1x3_36ep": (
        16,
        1e-4,
        36,
        [30],
        True,
        0.5,
        2048,
        0.0,
        900,
        20,
        0.0,
        1,
        300,
    ),
    # huawei-noah/noah-research, Focus-DETR: projects/focus_detr/configs, its data mapper (no crops)
    "focus_detr/focus_detr_r50_4scale_12ep": (
        16,
        1e-4,
        12,
        [11],
        False,
        0.0,
        2048,
        0.0,
        900,
        10000,
        -0.5,
        1,
        300,
    ),
    "focus_detr/focus_detr_r50_4scale_36ep": (
        16,
        1e-4,
        36,
        [20],
        False,
        0.0,
        2048,
        0.0,
        900,
        20,
        0.0,
        1,
        300,
    ),
    "focus_detr/focus_detr_r101_4scale_36ep": (
        16,
        1e-4,
        36,
        [28, 33.333],
        False,
        0.0,
        2048,
        0.0,
        900,
        20,
        0.0,
        1,
        300,
    ),
    # xiuqhou/Salience-DETR: train_config.py, configs; batch and drop as its authors say they trained
    "salience_detr/salience_detr_r50_4scale_12ep": (
        10,
        1e-4,
        12,
        [10],
        False,
        0.5,
        2048,
        0.0,
        900,
        10000,
        -0.5,
        1,
        300,
    ),
    "focus_detr/focus_detr_swin_tiny_224_4scale_36ep": (
        16,
        1e-4,
        36,
        [30],
        False,
        0.0,
        2048,
        0.0,
        900,
        10000,
        -0.5,
        1,
        300,
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    cfg = get_config(name)
    model, data = cfg.model, cfg.dataloader.train
    layer = model.transformer.decoder.layer
    assert RECIPES[name] == (
        data.total_batch_size,
        cfg.optimizer.lr,
        cfg.train.epochs,
        cfg.lr_multiplier.milestones,
        not data.dataset.filter_empty,
        data.mapper.augmentations.get("crop_prob", 0.5),
        layer.ffn_dim,
        layer.dropout,
        model.transformer.query_selection.num_queries,
        model.transformer.position.temperature,
        model.transformer.position.offset,
        model.criterion.weight_class,
        model.max_detections,
    )
    # what all of them share
    assert cfg.train.clip_grad == {"enabled": True, "max_norm": 0.1}
    assert cfg.optimizer.weight_decay == 1e-4 and cfg.optimizer.betas == [0.9, 0.999]
    assert cfg.lr_multiplier.gamma == 0.1 and not cfg.train.model_ema.enabled
    matcher, criterion = model.criterion.matcher, model.criterion
    assert (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou) == (2, 5, 2)
    assert (criterion.weight_bbox, criterion.weight_giou) == (5, 2)


# Trainable numbers per (lr, weight decay), from the names and shapes in the published models and
# the rules of their optimizers: names with "backbone", "sampling_offsets", "reference_points" at a
# tenth (DINO and its descendants: the backbone alone), norms without decay in detrex.
GROUPS = {
    ("deformable_detr/deformable_detr_r50_50ep", 91): {(2e-5, 1e-4): 24022530, (2e-4, 1e-4): 15824735},
    ("sparse_detr/sparse_detr_r50_10_50ep", 91): {(2e-5, 1e-4): 24022016, (2e-4, 1e-4): 17692789},
    ("dino/dino_r50_4scale_12ep", 80): {(1e-5, 1e-4): 23445504, (1e-4, 1e-4): 24176972, (1e-4, 0.0): 18432},
    ("dino/dino_official_r50_4scale_12ep", 91): {(1e-5, 1e-4): 23232512, (1e-4, 1e-4): 23438270},
    ("focus_detr/focus_detr_r50_4scale_12ep", 80): {
        (1e-5, 1e-4): 23445504,
        (1e-4, 1e-4): 25862992,
        (1e-4, 0.0): 22016,
    },
    ("lite_detr/lite_dino_r50_h3l1_2p1x3_36ep", 91): {(1e-5, 1e-4): 23232512, (1e-4, 1e-4): 24229310},
    # no decay of biases; of the norms all, in the published code those with "norm" in their name
    ("salience_detr/salience_detr_r50_4scale_12ep", 91): {
        (1e-5, 1e-4): 24018944,
        (1e-5, 0.0): 3072,
        (1e-4, 1e-4): 31733315,
        (1e-4, 0.0): 102764,
    },
    # 1024 of those without decay, the neck's norms and the proposals', have no "norm" in their published names
    ("rt_detr/rt_detr_r18_72ep", 80): {
        (1e-5, 1e-4): 11190112,
        (1e-5, 0.0): 9856,
        (1e-4, 1e-4): 8948992 - 1024,
        (1e-4, 0.0): 35504 + 1024,
    },
    ("rt_detr/rt_detr_r50_72ep", 80): {
        (1e-5, 1e-4): 23445504,
        (1e-4, 1e-4): 19360000 - 1024,
        (1e-4, 0.0): 57356 + 1024,
    },
    ("rt_detr/rt_detr_r101_72ep", 80): {(1e-6, 1e-4): 42385408, (1e-4, 1e-4): 34142348},
}


@pytest.mark.parametrize(("name", "num_classes"), GROUPS)
def test_learning_rate_and_decay_of_every_parameter(name, num_classes):
    cfg = get_config(name)
    cfg.model.num_classes = num_classes
    with torch.device("meta"):
        model = instantiate(cfg.model)
    groups = Counter()
    for group in build_optimizer(cfg.optimizer, model).param_groups:
        numbers = sum(p.numel() for p in group["params"])
        groups[round(group["lr"], 10), group["weight_decay"]] += numbers
    assert groups == GROUPS[name, num_classes]


@pytest.mark.parametrize("name", [n for n in list_configs() if re.search(r"_\d+ep", n)])
def test_a_name_says_epochs_keep_ratio_and_variant(name):
    cfg = get_config(name)
    assert cfg.train.epochs == int(re.search(r"_(\d+)ep", name)[1])
    encoder = cfg.model.transformer.encoder
    if ratio := re.search(r"sparse_detr_\w+?_(\d0)_50ep", name):
        assert encoder.keep_ratio == int(ratio[1]) / 100
    if variant := re.search(r"h(\d)l\d_(\d)p1x(\d)", name):
        high, updates, blocks = map(int, variant.groups())
        assert (encoder.num_high_levels, encoder.num_blocks) == (high, blocks)
        assert encoder.num_layers == updates * blocks
    if re.search("focus_detr_swin_(base|large)", name):  # not fine-tuned on ImageNet-1k
        assert cfg.train.init_checkpoint.endswith("_patch4_window12_384_22k.pth")
    if "focalnet" in name:
        assert cfg.model.backbone.freeze_at == 2
        assert cfg.model.backbone.options.drop_path_rate == 0.5
    elif name.startswith("salience_detr/salience_detr_") and "r50" not in name:  # torchvision's
        backbone = cfg.model.backbone
        assert backbone.get("frozen_stages", 1) == 1
        assert backbone.model.stochastic_depth_prob == (0.2 if "swin" in name else 0.5)
    elif "timm" in name:
        assert cfg.model.backbone.freeze_at == 2
        assert cfg.train.init_checkpoint == "timm://resnet18"
    elif "swin" in name:
        # drop path: 0.1 in detrex's Swin-T alone; stages frozen by Sparse DETR's authors alone
        swin = cfg.model.backbone
        assert swin.drop_path_rate == (0.1 if "swin_tiny" in name else 0.2)
        frozen = name.startswith(("sparse_detr/", "deformable_detr/"))
        assert swin.get("frozen_stages", -1) == (2 if frozen else -1)
    else:
        frozen = 1 if name.startswith(("dino/", "focus_detr/")) else 2  # detrex: the stem alone
        frozen = 2 if "official" in name or "focus_deformable" in name else frozen
        if name.startswith("rt_detr/"):  # R18 and R34 train all, R50 not the stem
            frozen = 0 if re.search("r18|r34", name) else 1
        assert cfg.model.backbone.freeze_at == frozen


def test_what_a_method_adds():
    dino = get_config("dino/dino_r50_4scale_12ep").model.transformer.denoising
    assert (dino.num_queries, dino.label_noise_ratio, dino.box_noise_scale) == (100, 0.5, 1.0)
    for name in ("dino/dino_official_r50_4scale_12ep", "lite_detr/lite_dino_swint_h3l1_2p1x3_36ep"):
        official = get_config(name).model.transformer.denoising  # its scripts' 1.0, not its files' 0.4
        assert official == {**dino, "flavour": "official"}
    hybrid = get_config("h_deformable_detr/h_deformable_detr_r50_12ep").model.transformer.query_selection
    assert (hybrid.num_one_to_many, hybrid.repeat, hybrid.weight) == (1500, 6, 1.0)
    sparse = get_config("sparse_detr/sparse_detr_r50_30_50ep").model.transformer.encoder
    assert sparse.loss_weight == 1.0 and sparse.auxiliary_heads
    salience = get_config("salience_detr/salience_detr_r50_4scale_12ep").model
    encoder = salience.transformer.encoder
    assert (encoder.num_objects, encoder.loss_weight, encoder.num_places) == (300, 2.0, 200)
    assert encoder.level_ratios == [0.4, 0.8, 1.0, 1.0]
    assert encoder.layer_ratios == [1.0, 0.8, 0.6, 0.6, 0.4, 0.2]
    assert encoder.size_ranges == [[-1, 64], [64, 128], [128, 256], [256, 99999]]
    assert salience.transformer.query_selection.nms_threshold == 0.3 and salience.criterion.iou_aware
    focus = get_config("focus_detr/focus_detr_r50_4scale_12ep").model.transformer.encoder
    assert (focus.keep_ratio, focus.num_objects, focus.loss_weight) == (0.5, 300, 1.5)
    assert focus.layer_ratios == [1.0, 0.8, 0.6, 0.6, 0.4, 0.2]
    assert focus.size_ranges == [[-1, 64], [64, 128], [128, 256], [256, 999999]]


def test_rt_detr():
    """lyuwenyu/RT-DETR: rtdetr_pytorch/configs/rtdetr, their optimizer, data and model."""
    cfg = get_config("rt_detr/rt_detr_r50_72ep")
    assert (cfg.dataloader.train.total_batch_size, cfg.optimizer.lr, cfg.train.epochs) == (16, 1e-4, 72)
    assert cfg.lr_multiplier.milestones == [] and cfg.train.clip_grad == {"enabled": True, "max_norm": 0.1}
    assert cfg.train.model_ema == {"enabled": True, "decay": 0.9999, "warmup": 2000}
    assert not cfg.dataloader.train.dataset.filter_empty
    params = cfg.optimizer.params
    assert params.lr_factor_func.rules == {"backbone": 0.1}
    assert (cfg.optimizer.weight_decay, params.weight_decay_norm, params.weight_decay_bias) == (1e-4, 0, 0)
    train, test = (cfg.dataloader[split].mapper.augmentations for split in ("train", "test"))
    assert train.size == test.size == 640
    assert sorted(train.sizes) == sorted([*range(480, 801, 32), 640, 640])
    assert not cfg.dataloader.train.aspect_ratio_grouping
    colors, zoom_out, crop, flip, *_ = instantiate(train)
    assert [colors.distort.p, zoom_out.prob, crop.prob, flip.prob] == [0.5, 0.5, 0.8, 0.5]
    transformer, criterion = cfg.model.transformer, cfg.model.criterion
    assert (transformer.num_levels, transformer.query_selection.num_queries) == (3, 300)
    assert (transformer.decoder.layer.ffn_dim, transformer.decoder.layer.dropout) == (1024, 0.0)
    assert transformer.denoising.num_queries == 100 and transformer.decoder.look_forward_twice
    assert (criterion.weight_class, criterion.weight_bbox, criterion.weight_giou) == (1, 5, 2)
    assert (cfg.model.pixel_mean, cfg.model.pixel_std) == ([0] * 3, [255] * 3)
    # unmatched scores weigh 0.75 p^2, which the authors call alpha; the matcher's alpha is its own
    criterion = instantiate(criterion)
    assert (1 - criterion.alpha, criterion.matcher.alpha) == (0.75, 0.25)
    small = [get_config(f"rt_detr/rt_detr_{size}_72ep").model for size in ("r18", "r34")]
    assert [m.transformer.decoder.num_layers for m in small] == [3, 4]
    assert [m.transformer.encoder.fusion.expansion for m in small] == [0.5, 0.5]


def test_images():
    """``make_coco_transforms`` of Deformable DETR, and all after it."""
    data = get_config("dino/dino_r50_4scale_12ep").dataloader
    train, test = data.train.mapper.augmentations, data.test.mapper.augmentations
    assert train.short_edges == list(range(480, 801, 32)) and train.max_size == 1333
    assert train.pre_crop_short_edges == [400, 500, 600] and train.crop_size == [384, 600]
    assert (test.short_edge, test.max_size) == (800, 1333)


def test_the_number_of_steps_of_detrex_is_the_override_that_its_config_names():
    """90,000 iterations and a drop at 82,500, whatever the number of images."""
    name = "dino/dino_r50_4scale_12ep"
    overrides = re.findall(r"[\w.]+=[\d.\[\]]+\d\]?", Path(config_path(name)).read_text())
    cfg = load_config(name, overrides)
    run = RunLength.from_config(cfg.train, COCO_WITH_OBJECTS, 16)
    schedule = build_lr_multiplier(cfg.lr_multiplier, run)
    rates = [schedule(step / run.max_iter) for step in (82499, 82500, 89999)]
    assert run.max_iter == 90000 and rates == pytest.approx([1.0, 0.1, 0.1])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("sparse_detr/sparse_detr_r50_10_50ep", 50 * 7393),
        ("h_deformable_detr/h_deformable_detr_r50_36ep", 36 * 7393),
        ("dino/dino_official_r50_4scale_12ep", 12 * 7393),
        ("deformable_detr/deformable_detr_r50_50ep", 50 * 3696),
    ],
)
def test_as_many_steps_as_the_authors_loops(name, steps):
    """Up to the last batch of an epoch, which is incomplete: full there on 8 processes, or dropped."""
    cfg = get_config(name)
    run = RunLength.from_config(cfg.train, COCO, cfg.dataloader.train.total_batch_size)
    assert abs(run.max_iter - steps) <= cfg.train.epochs / 2
