"""Devices and precisions by name."""

import logging

import pytest
import torch

from sparse_detr.devices import mixed_precision, multiplies_in_bfloat16, resolve_device, resolve_dtype
from sparse_detr.errors import UserError

CPU = torch.device("cpu")


def test_devices_are_looked_for_before_they_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for name, message in (
        ("cuda", "train.device=cuda, but torch sees no GPU: pass train.device=cpu"),
        ("gpu", "train.device=gpu: expected auto, cuda, cuda:0 or cpu"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_device(name, "train.device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="device=cuda:2, but torch sees 2 GPUs"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("units", [{"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_bf16": False}])
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(units, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **units}, raising=False)
    expected = torch.bfloat16 if any(units.values()) else torch.float32
    assert multiplies_in_bfloat16(CPU) == any(units.values())
    with caplog.at_level(logging.INFO):
        assert resolve_dtype("auto", CPU) == expected
    assert f"dtype=auto: {str(expected).removeprefix('torch.')} on this cpu" in caplog.text


def test_older_torch_is_asked_in_its_own_way(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert multiplies_in_bfloat16(CPU)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert not multiplies_in_bfloat16(CPU)


def test_precisions_have_torchs_names_or_are_torchs():
    assert resolve_dtype("bfloat16", CPU) == resolve_dtype(torch.bfloat16, CPU) == torch.bfloat16
    for name in ("bf16", torch.int8):
        with pytest.raises(UserError, match=f"train.eval_dtype={name}: expected auto, float32, bfloat16"):
            resolve_dtype(name, CPU, "train.eval_dtype")
    with pytest.raises(UserError, match="dtype=float16 needs a GPU, .* use bfloat16 or auto"):
        resolve_dtype("float16", CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision_is_autocast(dtype):
    with mixed_precision(CPU, dtype):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
