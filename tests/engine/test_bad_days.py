"""What goes wrong in long runs: a kill in the middle of it, a file that is cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader
from PIL import Image

from sparse_detr import config, engine
from sparse_detr.data import DetrDatasetMapper, build_train_loader

from ..run_files import same

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests" / "engine" / "tiny_shapes.py")


def overrides(data, output_dir):
    """40 iterations, in parts, with a moving average, images read by a worker process."""
    return [
        f"data.root={data}",
        f"train.output_dir={output_dir}",
        "train.model_ema.enabled=true",
        "train.grad_accumulation=2",
        "dataloader.train.num_workers=1",
        "train.max_iter=40",
        "train.eval_period=0",
        "train.checkpointer.period=2",
        "train.log_period=1",
    ]


def rows(folder):
    """The lines of metrics.json; a line that was being written does not count."""
    path = folder / "metrics.json"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if "total_loss" in row]


def losses(row):
    return {name: value for name, value in row.items() if "loss" in name or name == "grad_norm"}


def training(folder, *arguments, **environment):
    """A run of its own process group, with a line in the metrics for five steps of it."""
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_net.py"), "--config-file", TINY, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell starts background jobs deaf to Ctrl-C, and tests may be one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "projects"), **environment},
        )
    deadline = time.monotonic() + 200
    while len(rows(folder)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def said_by(folder):
    """What the run of ``training`` has printed."""
    return Path(f"{folder}.log").read_text()


@pytest.fixture
def steps(monkeypatch):
    """Losses of every step of runs in this process, by iteration."""
    recorded = {}
    run_step = engine.Trainer.run_step

    def recording(self):
        run_step(self)
        latest = {name: value for name, (value, _) in self.storage.latest().items()}
        recorded[self.iter] = losses(latest)

    monkeypatch.setattr(engine.Trainer, "run_step", recording)
    return recorded


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, steps):
    """SIGKILL at no particular moment; losses, weights and average stay the same bit by bit."""
    data, whole, killed = (tmp_path / name for name in ("data", "whole", "killed"))
    whole.mkdir()
    engine.train(config.load_config(TINY, overrides(data, whole)))
    expected = dict(steps)
    assert expected.keys() == set(range(40))

    process = training(killed, *overrides(data, killed), OMP_NUM_THREADS=str(torch.get_num_threads()))
    os.killpg(process.pid, signal.SIGKILL)  # and its worker
    process.wait()
    before = rows(killed)
    assert 5 <= len(before) < 40, "too early or too late to mean anything"
    assert [losses(row) for row in before] == [losses(row) for row in rows(whole)[: len(before)]]

    steps.clear()
    engine.train(config.load_config(TINY, overrides(data, killed)), resume=True)
    assert 0 < min(steps) <= len(before) and max(steps) == 39
    assert steps == {iteration: expected[iteration] for iteration in steps}
    first, second = (torch.load(f / "model_final.pth", weights_only=True) for f in (whole, killed))
    for part in ("model", "model_ema", "trainer"):
        assert same(first[part], second[part]), part


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_to_the_whole_group_ends_a_run_in_good_order(tmp_path, number, status, said):
    """As ``timeout``, SLURM and a terminal send it: also to the loader's worker process."""
    data, folder = tmp_path / "data", tmp_path / "run"
    process = training(folder, *overrides(data, folder), "train.max_iter=100000")
    os.killpg(process.pid, number)
    assert process.wait(timeout=100) == status, said_by(folder)
    output = said_by(folder)
    last = (folder / "last_checkpoint").read_text()
    assert "Traceback" not in output and said in output
    assert f"--resume goes on from {folder}/{last}" in output.splitlines()[-1]
    if number == signal.SIGTERM:  # nothing is lost
        assert torch.load(folder / last, weights_only=True)["iteration"] + 1 >= len(rows(folder))


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["launcher", "group"])
def test_sigterm_ends_several_processes_in_good_order(tmp_path, send):
    """The launcher passes it on; sent to all at once, it reaches the processes twice."""
    data, folder = tmp_path / "data", tmp_path / "run"
    options = ["train.max_iter=100000", "train.grad_accumulation=1", "--num-gpus", "2"]
    process = training(folder, *overrides(data, folder), *options, CUDA_VISIBLE_DEVICES="")
    send(process.pid, signal.SIGTERM)
    status, said = process.wait(timeout=100), said_by(folder)
    assert status == 143 and "Traceback" not in said, said
    last = (folder / "last_checkpoint").read_text()
    assert torch.load(folder / last, weights_only=True)["iteration"] + 1 >= len(rows(folder))
    assert f"--resume goes on from {folder}/{last}" in said


@pytest.fixture
def truncated(tmp_path):
    """One sound JPEG, and one whose second half is missing."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    records = []
    for index in range(2):
        path = tmp_path / f"{index}.jpg"
        Image.fromarray(pixels).save(path)
        records.append(
            {
                "file_name": str(path),
                "image_id": index,
                "height": 60,
                "width": 80,
                "annotations": [],
            }
        )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return records


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_image_is_named(truncated, num_workers):
    mapper = DetrDatasetMapper(is_train=False, augmentations=[])
    loader = iter(build_detection_test_loader(truncated, mapper=mapper, num_workers=num_workers))
    next(loader)
    with pytest.raises(OSError, match=r"cannot read image 1 \(.*1.jpg\): .*truncated"):
        next(loader)
    mapper = DetrDatasetMapper(is_train=True, augmentations=[])
    loader = build_train_loader(dataset=truncated, mapper=mapper, total_batch_size=2, num_workers=num_workers)
    with pytest.raises(RuntimeError, match=r"cannot read training image 1 \(.*1.jpg\): .*truncated"):
        next(iter(loader))
