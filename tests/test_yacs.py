"""detectron2's own DefaultTrainer and DefaultPredictor with the shipped yacs configs."""

import json
from importlib import resources

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, get_cfg
from detectron2.engine import DefaultPredictor, DefaultTrainer

from sparse_detr.config import get_config
from sparse_detr.data import shapes_dataset
from sparse_detr.yacs import add_sparse_detr_config, build_optimizer, constructor_arguments

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
    }


@pytest.mark.parametrize("name", FILES)
def test_the_recipe_is_that_of_the_lazy_config(name):
    yacs = config(name)
    lazy = get_config(yacs.MODEL.DETR.CONFIG)
    batch, solver = lazy.dataloader.train.total_batch_size, yacs.SOLVER
    assert solver.IMS_PER_BATCH == batch
    assert yacs.DATALOADER.FILTER_EMPTY_ANNOTATIONS == lazy.dataloader.train.dataset.filter_empty
    assert (solver.BASE_LR, solver.WEIGHT_DECAY) == (lazy.optimizer.lr, lazy.optimizer.weight_decay)
    # detrex counts 7500 iterations as an epoch; the authors' loops see every image but a last batch
    detrex = lazy.dataloader.train.dataset.filter_empty
    epoch = 7500 if detrex else {16: 7393, 32: 3696}[batch]
    epochs = [*lazy.lr_multiplier.milestones, lazy.train.epochs]
    assert [*solver.STEPS, solver.MAX_ITER] == [epoch * number for number in epochs]
    assert solver.CLIP_GRADIENTS.CLIP_VALUE == lazy.train.clip_grad.max_norm


@pytest.mark.parametrize("name", FILES)
def test_trains_and_predicts_with_detectron2s_engine(name, shapes, tmp_path):
    cfg = config(name)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.DETR.NUM_CLASSES = 5
    small = get_config(cfg.MODEL.DETR.CONFIG)
    shrink(small.model)
    LazyConfig.save(small, str(tmp_path / "small.yaml"))
    cfg.MODEL.DETR.CONFIG = str(tmp_path / "small.yaml")
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
    cfg.MODEL.DETR.OVERRIDES = ["model.max_detections=7", "optimizer.lr=0.5"]
    assert constructor_arguments(cfg, "")["max_detections"] == 7
    model = torch.nn.Linear(2, 2)
    model.default_config = ""
    assert build_optimizer(cfg, model).param_groups[0]["lr"] == 0.5


def test_a_saved_config_is_read_again(tmp_path):
    cfg = config("sparse_detr_r50.yaml")
    cfg.MODEL.DETR.NUM_CLASSES = 3
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_sparse_detr_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.MODEL.DETR == cfg.MODEL.DETR and again.SOLVER == cfg.SOLVER


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
