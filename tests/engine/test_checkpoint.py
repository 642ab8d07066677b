"""Writing, finding again and loading checkpoints."""

import argparse
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparse_detr.engine import Checkpointer
from sparse_detr.errors import UserError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 1)})
        self.head = nn.Linear(4, 2)


class Counter:
    """Something with a state, as the trainer has."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def checkpointer(path, value=0, **options):
    counter = Counter(value)
    return Checkpointer(Model(), str(path), trainer=counter, **options), counter


def save(path, name, value):
    saver, _ = checkpointer(path, value)
    with torch.no_grad():
        saver.model.head.bias.fill_(value)
    saver.save(name)


def resumed(path):
    loader, counter = checkpointer(path)
    loader.resume_or_load("", resume=True)
    assert loader.model.head.bias.tolist() == [counter.value] * 2
    return counter.value


def test_resume_takes_the_last_checkpoint(tmp_path):
    save(tmp_path, "model_0000009", 1)
    save(tmp_path, "model_0000019", 2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000019.pth"
    assert resumed(tmp_path) == 2
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_cut_checkpoint_falls_back_to_the_one_before(tmp_path, kept, caplog):
    save(tmp_path, "model_0000009", 1)
    save(tmp_path, "model_0000019", 2)
    last = tmp_path / "model_0000019.pth"
    content = last.read_bytes()
    last.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with caplog.at_level("ERROR"):
        assert resumed(tmp_path) == 1
    assert "cannot read" in caplog.text and "model_0000019.pth" in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009.pth"
    assert not last.exists() and (tmp_path / "model_0000019.pth.unreadable").exists()


def test_the_checkpoint_that_is_resumed_is_read_once(tmp_path, monkeypatch):
    save(tmp_path, "model_0000009", 1)
    read, files = torch.load, []
    monkeypatch.setattr(torch, "load", lambda f, **kw: files.append(Path(f).name) or read(f, **kw))
    assert resumed(tmp_path) == 1
    assert files == ["model_0000009.pth"]


def test_a_missing_tag_or_file_falls_back_as_well(tmp_path):
    save(tmp_path, "model_0000009", 1)
    save(tmp_path, "model_0000019", 2)
    (tmp_path / "last_checkpoint").unlink()
    assert resumed(tmp_path) == 2
    (tmp_path / "last_checkpoint").write_text("model_0000029.pth")
    assert resumed(tmp_path) == 2


def test_nothing_readable_is_an_error_not_a_fresh_start(tmp_path):
    (tmp_path / "model_0000009.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match="none of the checkpoints .*model_0000009.pth"):
        resumed(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint_alone(tmp_path, monkeypatch):
    save(tmp_path, "model_0000009", 1)

    def full(data, path):
        with open(path, "wb") as file:
            file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError) as error:
        save(tmp_path, "model_0000009", 2)
    monkeypatch.undo()
    message = str(error.value)
    assert f"cannot write the checkpoint {tmp_path}/model_0000009.pth" in message
    assert "No space left" in message and re.search(
        r"\(\d+ MiB are free there, \d+ MiB are needed\)", message
    )
    assert "go on with --resume" in message
    assert resumed(tmp_path) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_what_torch_says_when_a_file_cannot_grow(tmp_path):
    """The kernel itself stops the write, in the middle of torch's own file format."""
    resource = pytest.importorskip("resource")
    save(tmp_path, "model_0000009", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write the checkpoint .*model_0000019.pth"):
            save(tmp_path, "model_0000019", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert resumed(tmp_path) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    save(tmp_path, "model_0000009", 1)
    half = tmp_path / "model_0000019.pth.123.tmp"
    half.write_bytes(b"half a file")
    Checkpointer(Model(), str(tmp_path)).resume_or_load("")  # only looks: the run may be alive
    assert half.exists()
    assert resumed(tmp_path) == 1 and not half.exists()


def test_initial_weights_leave_the_trainer_alone(tmp_path):
    save(tmp_path, "weights", 3)
    loader, counter = checkpointer(tmp_path / "new")
    loader.resume_or_load(str(tmp_path / "weights.pth"), resume=False)
    assert loader.model.head.bias.tolist() == [3, 3] and counter.value == 0


@pytest.mark.parametrize("fine_tune", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_other_reference_points_than_in_training_are_told(tmp_path, caplog, trained, fine_tune):
    class Detector(nn.Module):
        def __init__(self, exact_sizes):
            super().__init__()
            self.transformer = nn.Linear(4, 2)
            self.exact_sizes = exact_sizes

    Checkpointer(Detector(trained), str(tmp_path)).save("model")
    path = str(tmp_path / "model.pth")
    for exact in (False, True):
        caplog.clear()
        with caplog.at_level("INFO"):
            Checkpointer(Detector(exact), fine_tune=fine_tune).load(path)
        told = [record for record in caplog.records if "exact_sizes=" in record.getMessage()]
        assert len(told) == (exact != trained)
        if told:
            assert told[0].levelname == ("INFO" if fine_tune else "WARNING")
            assert f"exact_sizes={exact if fine_tune else trained}" in told[0].getMessage()


def test_a_missing_file_is_named(tmp_path):
    loader, _ = checkpointer(tmp_path)
    with pytest.raises(ValueError, match="weights: there is no file .*/gone.pth"):
        loader.resume_or_load(str(tmp_path / "gone.pth"), resume=False)


def test_npz_backbones_find_their_place(tmp_path):
    """Names relative to the backbone, convolutions in float16."""
    weight = np.arange(12).reshape(4, 3, 1, 1).astype(np.float16) / 7
    np.savez(tmp_path / "r.npz", **{"stem.weight": weight, "stem.bias": np.ones(4, np.float32)})
    loader, _ = checkpointer(tmp_path, fine_tune=True)
    loader.load(str(tmp_path / "r.npz"), checkpointables=[])
    stem = loader.model.backbone["stem"]
    assert stem.weight.dtype == torch.float32
    assert torch.equal(stem.weight, torch.from_numpy(weight).float())
    assert stem.bias.tolist() == [1] * 4


def test_detectron2_pickles_load(tmp_path):
    content = {
        "model": {"stem.bias": np.full(4, 2.0, np.float32)},
        "__author__": "test",
        "matching_heuristics": True,
    }
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(content))
    loader, _ = checkpointer(tmp_path, fine_tune=True)
    loader.load(str(tmp_path / "r.pkl"), checkpointables=[])
    assert loader.model.backbone["stem"].bias.tolist() == [2] * 4


def test_a_namespace_of_arguments_is_no_obstacle(tmp_path):
    state = Model().state_dict()
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "published.pth")
    loader, _ = checkpointer(tmp_path)
    extra = loader.load(str(tmp_path / "published.pth"), checkpointables=[])
    assert extra["args"].lr == 1e-4
    assert torch.equal(loader.model.head.weight, state["head.weight"])


class Evil:
    def __reduce__(self):
        return (open, ("owned", "w"))


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Model().state_dict(), "extra": Evil()}, tmp_path / "evil.pth")
    loader, _ = checkpointer(tmp_path)
    with pytest.raises(UserError, match="more than tensors and plain values"):
        loader.load(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "owned").exists()
