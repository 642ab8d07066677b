"""Training batches as a pure function of (seed, iteration)."""

import itertools
import random

import numpy as np
import pytest
import torch

from sparse_detr.data.loader import TrainingBatchSampler, build_train_loader, seed_everything


def mapper(record):
    """Stands for augmentation: draws from all three generators."""
    draws = (random.random(), np.random.rand(), torch.rand(()).item())
    return {"image_id": record["image_id"], "draws": draws}


RECORDS = [{"image_id": i, "width": 10 + i % 3, "height": 11} for i in range(10)]


def batches(count, start_iter=0, seed=5, **kwargs):
    kwargs = {"total_batch_size": 4, "num_workers": 0, **kwargs}
    loader = build_train_loader(dataset=RECORDS, mapper=mapper, **kwargs)
    loader.batch_sampler.seed = seed
    loader.batch_sampler.start_iter = start_iter
    return list(itertools.islice(loader, count))


def test_a_late_start_continues_the_same_stream():
    assert batches(3, start_iter=4) == batches(7)[4:]


def test_workers_change_nothing():
    assert batches(4, num_workers=2) == batches(4)


def test_other_seeds_give_other_orders_and_augmentations():
    first, second = batches(3), batches(3, seed=6)
    assert [[x["image_id"] for x in b] for b in first] != [[x["image_id"] for x in b] for b in second]
    draws = [x["draws"] for b in first + second for x in b]
    assert len(set(draws)) == len(draws)


def test_every_epoch_holds_every_image_once():
    ids = [x["image_id"] for b in batches(5, aspect_ratio_grouping=False) for x in b]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10] != ids[10:]


def test_grouped_batches_hold_one_orientation_and_lose_no_image():
    grouped = batches(30)
    wide = [{RECORDS[x["image_id"]]["width"] > 11 for x in b} for b in grouped]
    assert all(len(kinds) == 1 for kinds in wide)
    counts = np.bincount([x["image_id"] for b in grouped for x in b], minlength=10)
    assert counts.min() >= 11 and counts.max() <= 13  # 12 epochs, up to what waits in the groups


def test_processes_share_one_stream(monkeypatch):
    """Rank r of R takes every R-th image of each total batch."""
    joint = batches(3)
    monkeypatch.setattr("sparse_detr.data.loader.comm.get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("sparse_detr.data.loader.comm.get_rank", lambda rank=rank: rank)
        parts.append(batches(3))
    for whole, even, odd in zip(joint, *parts, strict=True):
        assert whole[0::2] == even and whole[1::2] == odd


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr("sparse_detr.data.loader.comm.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="total_batch_size=4 .* number of processes .3."):
        TrainingBatchSampler(10, 4)


def test_an_unreadable_image_is_named():
    def broken(record):
        raise OSError("image file is truncated")

    loader = build_train_loader(dataset=RECORDS, mapper=broken, total_batch_size=1, num_workers=0)
    with pytest.raises(RuntimeError, match=r"training image \d .*: image file is truncated"):
        next(iter(loader))


def test_seed_everything_sets_all_generators():
    draws = []
    for _ in range(2):
        seed_everything(1, 2, 3)
        draws.append((random.random(), np.random.rand(), torch.rand(2).tolist()))
    assert draws[0] == draws[1]
