"""detectron2's own DefaultTrainer and DefaultPredictor with the shipped yacs configs."""

import argparse
import importlib
import json
from importlib import resources

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from sparse_detr.config import get_config
from sparse_detr.data import shapes_dataset
from sparse_detr.errors import UserError
from sparse_detr.modeling import SparseDETR, detectors
from sparse_detr.yacs import add_sparse_detr_config, build_optimizer
from sparse_detr.yacs_config import from_yacs

from .modeling.test_lite import published_names
from .modeling.tiny import shrink

FOLDER = resources.files("sparse_detr.configs") / "yacs"
FILES = sorted(p.name for p in FOLDER.iterdir() if p.name.endswith(".yaml") and p.name != "base.yaml")


class Trainer(DefaultTrainer):
    build_optimizer = staticmethod(build_optimizer)


def config(name):
    cfg = get_cfg()
    add_sparse_detr_config(cfg)
    cfg.merge_from_file(str(FOLDER / name))
    return cfg


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("shapes"))
    shapes_dataset(names="yacs_shapes", root=root, split="train", num_images=6)
    return "yacs_shapes"


def test_one_file_per_method():
    assert {config(name).MODEL.META_ARCHITECTURE for name in FILES} == {
        "DeformableDETR",
        "DINO",
        "SparseDETR",
        "FocusDETR",
        "LiteDETR",
        "SalienceDETR",
        "RTDETR",
    }


@pytest.mark.parametrize("name", FILES)
def test_the_recipe_is_that_of_the_lazy_config(name):
    yacs = config(name)
    lazy = get_config(yacs.MODEL.SPARSE_DETR.CONFIG)
    batch, solver = lazy.dataloader.train.total_batch_size, yacs.SOLVER
    assert solver.IMS_PER_BATCH == batch
    assert yacs.DATALOADER.FILTER_EMPTY_ANNOTATIONS == lazy.dataloader.train.dataset.filter_empty
    assert (solver.BASE_LR, solver.WEIGHT_DECAY) == (lazy.optimizer.lr, lazy.optimizer.weight_decay)
    # detrex counts 7500 iterations as an epoch; the authors' loops see every image but a last batch
    detrex = lazy.dataloader.train.dataset.filter_empty
    epoch = 7500 if detrex else {16: 7393, 32: 3696}[batch]
    if batch == 10:  # Salience DETR's authors; images with objects only
        epoch = 11727
    epochs = [*lazy.lr_multiplier.milestones, lazy.train.epochs]
    assert [*solver.STEPS, solver.MAX_ITER] == [epoch * number for number in epochs]
    assert solver.CLIP_GRADIENTS.CLIP_VALUE == lazy.train.clip_grad.max_norm


@pytest.mark.parametrize("name", FILES)
def test_trains_and_predicts_with_detectron2s_engine(name, shapes, tmp_path):
    cfg = config(name)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.SPARSE_DETR.NUM_CLASSES = 5
    small = get_config(cfg.MODEL.SPARSE_DETR.CONFIG)
    shrink(small.model)
    LazyConfig.save(small, str(tmp_path / "small.yaml"))
    cfg.MODEL.SPARSE_DETR.CONFIG = str(tmp_path / "small.yaml")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (shapes,), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 2, ()
    cfg.OUTPUT_DIR = str(tmp_path)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert np.isfinite(metrics[-1]["total_loss"])

    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    found = DefaultPredictor(cfg)(image)["instances"]
    assert found.image_size == (60, 80) and 0 < len(found) <= cfg.TEST.DETECTIONS_PER_IMAGE


def test_overrides_win_over_the_numbers_of_the_yacs_config():
    cfg = config("sparse_detr_r50.yaml")
    cfg.MODEL.SPARSE_DETR.OVERRIDES = ["model.max_detections=7", "optimizer.lr=0.5"]
    assert SparseDETR.from_config(cfg)["max_detections"] == 7
    model = torch.nn.Linear(2, 2)
    model.default_config = ""
    assert build_optimizer(cfg, model).param_groups[0]["lr"] == 0.5


def test_a_saved_config_is_read_again(tmp_path):
    cfg = config("sparse_detr_r50.yaml")
    cfg.MODEL.SPARSE_DETR.NUM_CLASSES = 3
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_sparse_detr_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.MODEL.SPARSE_DETR == cfg.MODEL.SPARSE_DETR and again.SOLVER == cfg.SOLVER


def test_the_optimizer_is_the_lazy_configs_with_the_solvers_numbers():
    cfg = config("sparse_detr_r50.yaml")
    cfg.SOLVER.BASE_LR = 0.01
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    model.default_config = ""
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[model["backbone"].weight] == pytest.approx(0.001)
    assert rates[model["head"].weight] == 0.01

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    assert norms.norm() == pytest.approx(0.1)  # over all parameters


# The node that was once called MODEL.DETR, as DETR's own detectron2 wrapper still calls its own.

FOREIGN = {"NUM_CLASSES": 80, "NUM_OBJECT_QUERIES": 100, "MASK_ON": False}


def add_detr_config(cfg):
    """What facebookresearch/detr's ``d2`` does."""
    cfg.MODEL.DETR = CfgNode(FOREIGN)


@pytest.mark.parametrize(
    "adders", [(add_detr_config, add_sparse_detr_config), (add_sparse_detr_config, add_detr_config)]
)
def test_both_projects_nodes_live_in_one_config(adders, tmp_path, caplog):
    def fresh():
        cfg = get_cfg()
        for add in adders:
            add(cfg)
        return cfg

    cfg = fresh()
    cfg.MODEL.DETR.NUM_CLASSES, cfg.MODEL.SPARSE_DETR.NUM_CLASSES = 250, 3
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = fresh()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    for each in (cfg, again):
        assert dict(each.MODEL.DETR) == {**FOREIGN, "NUM_CLASSES": 250}
        assert from_yacs(each, "sparse_detr/sparse_detr_r50_30_50ep").model.num_classes == 3
    assert not caplog.records


FORMER = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: "SparseDETR"
  DETR:
    CONFIG: "sparse_detr/sparse_detr_r50_10_50ep"
    NUM_CLASSES: 3
    OVERRIDES: ["model.max_detections=7"]
"""


def test_a_file_with_the_former_name_is_read_with_a_warning(tmp_path, caplog):
    (tmp_path / "old.yaml").write_text(FORMER)
    cfg = get_cfg()
    add_sparse_detr_config(cfg)
    cfg.merge_from_file(str(tmp_path / "old.yaml"))
    model = from_yacs(cfg.clone(), "").model
    assert (model.num_classes, model.max_detections) == (3, 7)
    assert model.transformer.encoder.keep_ratio == 0.1
    (record,) = caplog.records
    assert record.message.startswith("MODEL.DETR is now MODEL.SPARSE_DETR: rename it")


def test_code_with_the_former_name_wins_over_a_shipped_file(caplog):
    cfg = config("sparse_detr_r50.yaml")
    cfg.MODEL.DETR.NUM_CLASSES = 3
    assert from_yacs(cfg, "").model.num_classes == 3
    assert len(caplog.records) == 1


def test_a_detr_node_that_is_not_ours_is_no_substitute():
    cfg = get_cfg()
    add_detr_config(cfg)
    with pytest.raises(UserError, match=r"no MODEL.SPARSE_DETR: call .*add_sparse_detr_config\(cfg\)"):
        from_yacs(cfg, "dino/dino_r50_4scale_12ep")


# Names in detectron2's registry


def test_any_config_can_be_built_without_a_name_of_its_own():
    cfg = get_cfg()
    add_sparse_detr_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "SetDetector", "cpu"
    with pytest.raises(
        UserError, match="SetDetector has no config of its own: name one in MODEL.SPARSE_DETR"
    ):
        build_model(cfg)
    cfg.MODEL.SPARSE_DETR.CONFIG = "deformable_detr/deformable_detr_r50_50ep"
    assert type(build_model(cfg)) is detectors.SetDetector


def test_registering_again_is_no_error():
    """After a reload, and under the other name of the package."""
    known = META_ARCH_REGISTRY.get("DINO")
    module = importlib.util.spec_from_file_location("sparse_detr.modeling.again", detectors.__file__)
    again = importlib.util.module_from_spec(module)
    module.loader.exec_module(again)
    assert again.DINO is not known and META_ARCH_REGISTRY.get("DINO") is known


def test_a_name_that_another_project_has_registered_is_an_error(monkeypatch):
    class DINO(torch.nn.Module):
        pass

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "DINO", DINO)
    monkeypatch.delitem(META_ARCH_REGISTRY._obj_map, "LiteDETR")
    with pytest.raises(UserError, match=rf"sparse_detr.modeling.detectors registers DINO .*{__name__} has"):
        detectors._register(detectors.LiteDETR, detectors.DINO)
    assert "LiteDETR" not in META_ARCH_REGISTRY  # all or none


# What detectron2's engine and keys would pass over in silence


@pytest.fixture
def small(tmp_path):
    """A yacs config of a small model with 5 classes, and the model."""
    cfg = config("lite_dino_r50.yaml")
    lazy = get_config(cfg.MODEL.SPARSE_DETR.CONFIG)
    shrink(lazy.model)
    LazyConfig.save(lazy, str(tmp_path / "small.yaml"))
    cfg.MODEL.SPARSE_DETR.CONFIG, cfg.MODEL.SPARSE_DETR.NUM_CLASSES = str(tmp_path / "small.yaml"), 5
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.INPUT.MIN_SIZE_TEST = "cpu", "", 64
    return cfg, build_model(cfg).eval()


def save_published(model, path):
    """As Lite DETR's authors would have saved it: their names, and their arguments as a Namespace."""
    torch.save({"model": published_names(model), "args": argparse.Namespace(lr=1e-4)}, path)
    return str(path)


def test_default_predictor_converts_a_published_file(small, tmp_path):
    cfg, model = small
    torch.nn.init.normal_(model.transformer.heads.class_heads[0].weight)
    cfg.MODEL.WEIGHTS = save_published(model, tmp_path / "published.pth")
    loaded = DefaultPredictor(cfg).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_so_does_detectron2s_checkpointer_with_the_model_of_a_lazy_config(small, tmp_path):
    """As in its ``lazyconfig_train_net.py``."""
    cfg, model = small
    lazy = instantiate(get_config(cfg.MODEL.SPARSE_DETR.CONFIG, ["model.num_classes=5"]).model)
    DetectionCheckpointer(lazy).load(save_published(model, tmp_path / "published.pth"))
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in lazy.state_dict().items())


def test_default_predictor_refuses_weights_that_leave_the_model_random(small, tmp_path):
    cfg, model = small
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    for weights, message in (
        ({f"other.{name}": value for name, value in model.state_dict().items()}, "tensors are missing"),
        ({n: v for n, v in model.state_dict().items() if n.startswith("backbone")}, "A backbone alone"),
    ):
        torch.save({"model": weights}, cfg.MODEL.WEIGHTS)
        with pytest.raises(UserError, match=message):
            DefaultPredictor(cfg)
    cfg.MODEL.WEIGHTS = save_published(model, tmp_path / "published.pth")
    cfg.MODEL.SPARSE_DETR.NUM_CLASSES = 4
    with pytest.raises(UserError, match="trained for 5 classes, the model has 4"):
        DefaultPredictor(cfg)


def test_training_may_start_from_a_published_file_of_other_classes(small, tmp_path):
    cfg, model = small
    weights = save_published(model, tmp_path / "published.pth")
    cfg.MODEL.SPARSE_DETR.NUM_CLASSES = 4
    other = build_model(cfg).train()
    DetectionCheckpointer(other).load(weights)
    name = "transformer.level_embed"
    assert torch.equal(other.state_dict()[name], model.state_dict()[name])


def test_keys_of_detectron2_with_one_meaning_are_followed(caplog):
    caplog.set_level("INFO")
    cfg = config("sparse_detr_r50.yaml")
    cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0, 101, 3
    model = from_yacs(cfg, "").model
    assert (model.backbone.freeze_at, model.backbone.stages.depth, model.num_classes) == (0, 101, 3)
    assert {record.levelname for record in caplog.records} == {"INFO"} and len(caplog.records) == 3
    cfg.MODEL.SPARSE_DETR.NUM_CLASSES = 4
    with pytest.raises(UserError, match="SPARSE_DETR.NUM_CLASSES=4, but MODEL.ROI_HEADS.NUM_CLASSES=3"):
        from_yacs(cfg, "")


def test_other_keys_of_detectron2_are_named(caplog):
    cfg = config("sparse_detr_r50.yaml")
    from_yacs(cfg, "")
    assert not caplog.records
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.MASK_ON, cfg.SOLVER.MOMENTUM = 64, True, 0.5
    from_yacs(cfg, "")
    (record,) = caplog.records
    assert "MODEL.FPN.OUT_CHANNELS=64" in record.message and "MODEL.MASK_ON=True" in record.message
    model = torch.nn.Linear(2, 2)
    model.default_config = ""
    build_optimizer(cfg, model)
    assert "SOLVER.MOMENTUM=0.5" in caplog.text
    caplog.clear()
    cfg = config("sparse_detr_r50.yaml")
    cfg.MODEL.SPARSE_DETR.CONFIG = "sparse_detr/sparse_detr_swint_30_50ep"
    cfg.MODEL.RESNETS.DEPTH = 101
    from_yacs(cfg, "")
    assert "no such setting: MODEL.RESNETS.DEPTH=101" in caplog.text


def test_a_forgotten_build_optimizer_is_named(small):
    cfg, model = small
    with pytest.raises(UserError, match=r"class Trainer.*\n +build_optimizer = staticmethod"):
        DefaultTrainer.build_optimizer(cfg, model)
