"""Weights & Biases, with a module in its place."""

import sys
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from sparse_detr.engine.writers import build_writers


def test_wandb_gets_every_number_once(tmp_path, monkeypatch):
    started, rows, finished = [], [], []
    run = SimpleNamespace(log=lambda row, step: rows.append((step, row)), finish=lambda: finished.append(1))
    fake = SimpleNamespace(init=lambda **params: started.append(params) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    *_, writer = build_writers(str(tmp_path), 10, 5.0, {"project": "p", "id": "7"})
    assert started == [{"dir": str(tmp_path), "resume": "allow", "project": "p", "id": "7"}]
    with EventStorage(3) as storage:
        storage.put_scalar("lr", 0.5, smoothing_hint=False)
        storage.put_scalar("total_loss", 2.0)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalar("total_loss", 4.0)
        writer.write()
        writer.close()
    assert rows == [(3, {"lr": 0.5, "total_loss": 2.0}), (4, {"total_loss": 3.0})]  # smoothed
    assert finished == [1]


def test_wandb_is_only_imported_on_demand(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    build_writers(str(tmp_path), 10, 5.0)
    with pytest.raises(ValueError, match="train.wandb.enabled=True needs wandb.*pip install wandb"):
        build_writers(str(tmp_path), 10, 5.0, {})
