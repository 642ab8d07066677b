"""Configs: finding, loading, overriding, saving and loading again."""

import re
from pathlib import Path

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf
from torch import nn

from sparse_detr.config import (
    apply_overrides,
    config_path,
    get_config,
    list_configs,
    load_config,
)
from sparse_detr.errors import UserError

QUICK = "quick/deformable_detr_shapes"


def config():
    return OmegaConf.create(
        {
            "model": L(nn.Conv2d)(in_channels=3, out_channels=8, kernel_size=1),
            "optimizer": {"lr": 0.1, "rules": {"backbone": 0.1}, "steps": [1, 2]},
            "train": {"max_iter": None, "amp": {"enabled": False}},
        },
        flags={"allow_objects": True},
    )


def overridden(*overrides):
    cfg = config()
    apply_overrides(cfg, overrides)
    return cfg


def test_overrides_set_values_of_any_kind():
    cfg = overridden(
        "optimizer.lr=1e-4",
        "train.max_iter=7",
        "train.amp.enabled=true",
        "optimizer.steps=[3,4]",
        "optimizer.rules={backbone: 0.5}",
    )
    assert cfg.optimizer.lr == 1e-4 and cfg.train.max_iter == 7 and cfg.train.amp.enabled is True
    assert cfg.optimizer.steps == [3, 4] and cfg.optimizer.rules.backbone == 0.5
    assert overridden("optimizer.steps.1=9").optimizer.steps == [1, 9]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("optimiser.lr=1", "optimizer.lr"),
        ("lr=1", "optimizer.lr"),
        ("model.lr=1", "optimizer.lr"),
        ("train.amp.enable=true", "train.amp.enabled"),
        ("train.amp={enable: true}", "train.amp.enabled"),
        ("model.kernel=3", "model.kernel_size"),
        ("model.paddin=1", "model.padding"),
        ("optimizer.steps.2=1", "optimizer.steps"),
    ],
)
def test_a_mistyped_key_is_an_error_that_guesses(typo, meant):
    with pytest.raises(ValueError, match=rf"the config has no .*Did you mean [^?]*{meant}\b"):
        overridden(typo)


def test_arguments_that_the_config_leaves_at_their_default_can_be_set():
    assert instantiate(overridden("model.padding=2").model).padding == (2, 2)


def test_a_plus_adds_a_key_on_purpose():
    assert overridden("+optimizer.rules.neck=0.2").optimizer.rules.neck == 0.2
    with pytest.raises(ValueError, match=r"\+optimizer.rules.neck=... adds"):
        overridden("optimizer.rules.neck=0.2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("SOLVER.BASE_LR", "cannot read the override 'SOLVER.BASE_LR': expected path.key=value"),
        ("~optimizer.lr", "deleting a key is not supported"),
        ("optimizer.lr.x=1", "the config has no 'optimizer.lr.x'"),
    ],
)
def test_unreadable_overrides_are_explained(override, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        overridden(override)


@pytest.mark.parametrize(
    "name", ["data (1)", "a,b", "a=b", "50%", "ü", "a'b", "a#b", "a&b", "[x]", "{y}", "a:b", "a\\"]
)
def test_a_path_may_have_any_characters(name):
    for path in (f"/data/{name}/train.json", f"data/{name}/", f"/data/{name}"):
        assert overridden(f"train.max_iter={path}").train.max_iter == path


def test_a_path_may_start_at_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert overridden("train.max_iter=~/x.json").train.max_iter == "/home/me/x.json"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.steps=20,30", r"a list is written \[20,30\]"),
        ("optimizer.steps=20", r"is a list: write \[20\]"),
        ("train.amp.enabled=no", "train.amp.enabled is true or false"),
        ("train.amp.enabled=null", "train.amp.enabled is true or false"),
        ("train.amp={enabled: off}", "train.amp.enabled is true or false"),
        ("train.amp=true", "train.amp is a section: set one of its keys, train.amp.enabled="),
        ("model=resnet", "model is a section"),
        ("train.max_iter=None", "train.max_iter cannot be None: write null"),
        ("train.max_iter=a (b)", "cannot read .* quoted twice, once for the shell: .*'a \\(b\\)'"),
    ],
)
def test_a_value_of_another_kind_is_an_error_that_says_how_to_write_it(override, message):
    with pytest.raises(UserError, match=message):
        overridden(override)


def test_sections_and_lists_take_null_and_their_kind():
    cfg = overridden("train.amp=null", "optimizer.rules={backbone: 1}", "optimizer.steps=[]")
    assert cfg.train.amp is None and cfg.optimizer.rules.backbone == 1 and cfg.optimizer.steps == []


def test_shipped_configs_are_found_by_name():
    assert QUICK in list_configs()
    assert not [n for n in list_configs() if n.split("/")[0] in ("common", "models", "encoders")]
    for name in (QUICK, f"{QUICK}.py", f"configs/{QUICK}.py"):
        assert config_path(name).endswith("quick/deformable_detr_shapes.py")
    with pytest.raises(ValueError, match=f"no config 'quick/deformable_detr'.*mean .*{QUICK}"):
        get_config("quick/deformable_detr")


@pytest.mark.parametrize("name", list_configs())
def test_every_config_survives_saving_and_loading(name, tmp_path):
    """A run's config.yaml means the same as the file it came from."""
    cfg = get_config(name)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert not (tmp_path / "config.yaml.pkl").exists()
    again = load_config(str(tmp_path / "config.yaml"), ["train.seed=1"])
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= set(again)
    again.train.seed = cfg.train.seed
    assert OmegaConf.to_container(strings(again)) == OmegaConf.to_container(strings(cfg))


def strings(cfg):
    """Targets by name: saving turns classes into their names."""
    from detectron2.config.lazy import _visit_dict_config
    from detectron2.utils.registry import _convert_target_to_string

    def replace(node):
        if "_target_" in node and callable(node._target_):
            node._target_ = _convert_target_to_string(node._target_)

    cfg = cfg.copy()
    _visit_dict_config(cfg, replace)
    return cfg


def test_overrides_reach_what_is_built_from_them():
    cfg = get_config(QUICK, ["model.num_classes=3", "model.transformer.embed_dim=192"])
    model = instantiate(cfg.model)
    assert model.num_classes == model.transformer.heads.num_classes == 3
    assert model.transformer.level_embed.shape == (3, 192)


def python_blocks(page):
    text = (Path(__file__).resolve().parents[1] / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_the_config_of_ones_own_in_the_docs_is_one(tmp_path):
    """docs/own_data.md: a file anywhere that defines ``cfg``; its interpolations count from its root."""
    (block,) = [block for block in python_blocks("own_data.md") if "get_config" in block]
    (tmp_path / "my_config.py").write_text(block)
    cfg = load_config(str(tmp_path / "my_config.py"), ["train.epochs=6", "optimizer.lr=1e-5"])
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train", "data"} <= cfg.keys()
    assert (cfg.train.epochs, cfg.lr_multiplier.milestones) == (6, [10])
    assert cfg.dataloader.train.dataset.data.train_json == "train.json"
    assert cfg.optimizer.params.base_lr == 1e-5
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert load_config(str(tmp_path / "config.yaml")).optimizer.params.base_lr == 1e-5


def test_the_method_of_ones_own_in_the_docs_is_a_config(tmp_path, monkeypatch):
    """docs/add_method.md: the class in a module, and the config that puts it on a base."""
    method, block = python_blocks("add_method.md")
    (tmp_path / "my_method.py").write_text(method)
    (tmp_path / "my_config.py").write_text("from my_method import LargestEncoder\n" + block)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = load_config(str(tmp_path / "my_config.py"), ["model.transformer.encoder.keep_ratio=0.2"])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    encoder = instantiate(load_config(str(tmp_path)).model.transformer.encoder)
    assert type(encoder).__name__ == "LargestEncoder" and encoder.keep_ratio == 0.2


def test_a_runs_folder_stands_for_its_config(tmp_path):
    with pytest.raises(UserError, match="no output folder of a run: it holds no config.yaml"):
        config_path(str(tmp_path))
    (tmp_path / "config.yaml").write_text("model: {}")
    assert config_path(str(tmp_path)) == str(tmp_path / "config.yaml")


def test_without_a_config_it_says_what_to_pass():
    with pytest.raises(UserError, match="pass --config-file with .* such as custom/sparse_detr_r50"):
        config_path("")


@pytest.mark.parametrize("value", ["20241126", "2024_11_26", "007", "true", "1e3", "1.50", "inf"])
@pytest.mark.parametrize("key", ["train.output_dir", "data.train_images", "data.val_json"])
def test_the_value_of_a_key_that_is_a_path_is_text(key, value, tmp_path):
    cfg = load_config("custom/sparse_detr_r50", [f"{key}={value}"])
    assert OmegaConf.select(cfg, key) == value
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert OmegaConf.select(load_config(tmp_path / "config.yaml"), key) == value


def test_other_values_keep_their_kind():
    overrides = [
        "train.output_dir='1'",
        "data.train_images=null",
        "train.max_iter=5",
        "train.amp.enabled=true",
    ]
    cfg = load_config("custom/sparse_detr_r50", overrides)
    assert (cfg.train.output_dir, cfg.data.train_images) == ("1", None)
    assert cfg.train.max_iter == 5 and cfg.train.amp.enabled is True
