"""The table from the papers to the code names things that exist."""

import ast
import functools
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sparse_detr.config import get_config, list_configs

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "projects" / "sparse_detr" / "README.md").read_text(encoding="utf-8")
PLACES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)))
KEYS = sorted(set(re.findall(r"`(model\.[\w.]+)`", TEXT)))


@pytest.mark.parametrize("file, name", PLACES, ids=":".join)
def test_function_exists(file, name):
    path = ROOT / file if file.startswith("kernels/") else ROOT / "projects" / "sparse_detr" / file
    scope = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [n for n in scope if getattr(n, "name", None) == part]
        assert found, f"{file} has no {name}"
        scope = getattr(found[0], "body", [])


config = functools.cache(get_config)


@pytest.mark.parametrize("key", KEYS)
def test_config_key_exists(key):
    missing = object()
    found = (OmegaConf.select(config(name), key, default=missing) for name in list_configs())
    assert any(value is not missing for value in found), f"no shipped config has {key}"


def test_the_table_is_not_empty():
    assert len(PLACES) > 8 and len(KEYS) > 5
