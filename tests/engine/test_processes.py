"""More than one process: started by torchrun or SLURM, and doing what one process does."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from sparse_detr import config, engine
from sparse_detr.engine import processes

from ..run_files import detections, metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "tests" / "engine" / "data_parallel.py")  # three iterations of four images


def load(data, output_dir):
    return config.load_config(CONFIG, [f"data.root={data}", f"train.output_dir={output_dir}"])


def empty_one_share(data):
    """Takes the objects from the images that process 1 of 2 gets in the second iteration."""
    loader = instantiate(load(data, "").dataloader.train)
    loader.batch_sampler.seed = load(data, "").train.seed
    batch = next(itertools.islice(iter(loader.batch_sampler), 1, None))
    images = {loader.dataset.records[sample.image]["image_id"] for sample in batch[1::2]}
    path = data / "train.json"
    content = json.loads(path.read_text())
    kept = [a for a in content["annotations"] if a["image_id"] not in images]
    assert len(images) == 2 and len(kept) < len(content["annotations"])
    path.write_text(json.dumps({**content, "annotations": kept}))


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_joint_batch(tmp_path):
    """With torchrun, accumulation, recomputed activations and a moving average; in iteration 1 one
    process has no object."""
    data, one, two = (tmp_path / name for name in ("data", "one", "two"))
    empty_one_share(data)
    overrides = [f"data.root={data}", f"train.output_dir={two}", "train.grad_accumulation=2"]
    overrides += ["model.transformer.activation_checkpointing=true"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "train_net.py"), "--config-file", CONFIG, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]

    one.mkdir()
    cfg = load(data, one)
    engine.train(cfg)
    alone, together = metrics(one), metrics(two)
    single, double = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
    for iteration in range(3):
        for key in [k for k in alone[iteration] if "loss" in k or k == "grad_norm"]:
            # logged in float32: rounded once per part, process and mean
            assert together[iteration][key] == pytest.approx(alone[iteration][key], rel=4 * single), key
    # A gradient, of norm max_norm at most, is a sum over no more than the batch's pixels; where it is
    # small, Adam divides its error by eps. (The weights move by 3 lr.)
    terms = 4 * 64 * 64
    error = terms * double * cfg.train.clip_grad.max_norm / 1e-8 * cfg.optimizer.lr * cfg.train.max_iter
    assert error < 1e-3 * cfg.optimizer.lr
    first, second = (torch.load(f / "model_final.pth", weights_only=True) for f in (one, two))
    for part in ("model", "model_ema"):
        for name, weight in first[part].items():
            torch.testing.assert_close(second[part][name], weight, rtol=0, atol=error)

    # The evaluation: every image once, and what one process finds with these weights.
    gathered = detections(two)
    assert sorted(Counter(d["image_id"] for d in gathered)) == [1, 2, 3, 4, 5]
    cfg = load(data, one)
    cfg.train.init_checkpoint = str(two / "model_final.pth")
    results = engine.evaluate(cfg)["bbox"]
    expected = detections(one)
    assert len(gathered) == len(expected)
    for found, wanted in zip(gathered, expected):
        assert found.keys() == wanted.keys()
        for key in ("image_id", "category_id"):
            assert found[key] == wanted[key]
        assert found["score"] == pytest.approx(wanted["score"], rel=terms * double)
        # detectron2 keeps boxes in float32; width and height are differences of coordinates up to 64
        assert found["bbox"] == pytest.approx(wanted["bbox"], abs=2 * 64 * single)
    for name in ("AP", "AP50", "AP75"):
        assert together[3][f"bbox/{name}"] == results[name]


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-05,07],login1",
}


def test_torchrun_is_recognised():
    assert processes.started_process({**TORCHRUN, "HOME": "/"}) == TORCHRUN
    assert processes.started_process({**SLURM, **TORCHRUN}) == TORCHRUN  # torchrun under srun
    assert processes.started_process({"RANK": "0", "WORLD_SIZE": "2"}) is None


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("gpu[03-05,07],login1", "gpu03"),
        ("a1,a2", "a1"),
        ("node7", "node7"),
        ("rack[1-2]n[01-02].site", "rack1n01.site"),
    ],
)
def test_a_slurm_step_is_recognised(nodes, host):
    found = processes.started_process({**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert found == {**TORCHRUN, "MASTER_ADDR": host, "MASTER_PORT": "23456"}
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"}
    assert processes.started_process({**SLURM, **own}) == {**TORCHRUN, **own}


def test_a_batch_script_without_srun_waits_for_nobody():
    """SLURM_NTASKS says what was asked for; only a job step has started it."""
    script = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert processes.started_process(script) is None
    assert processes.started_process({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None


TRAINS = """
import argparse, os
from torch import nn, ones
from detectron2.utils import comm
from sparse_detr.engine import processes

def threads():
    return {open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")}

def main(args):
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    model.itself = [model]
    model(ones(1, 2)).sum().backward()
    comm._get_global_gloo_group()  # as comm.gather does
    print(threads())

processes.launch(main, argparse.Namespace(num_gpus=1, num_machines=1))
print(threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_no_thread_outlives_its_process_group():
    """One that gives back a tensor while the interpreter ends aborts the process."""
    environment = {
        **os.environ,
        **TORCHRUN,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT / "projects"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAINS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    inside, after = done.stdout.splitlines()
    assert "gloo" in inside and "gloo" not in after


def arguments(**kwargs):
    defaults = dict(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")
    return argparse.Namespace(**{**defaults, **kwargs})


def test_detectron2_starts_processes_that_are_asked_for(monkeypatch):
    """Also one task per node under srun, as detectron2 users do it."""
    calls = []
    monkeypatch.setattr(processes, "detectron2_launch", lambda main, n, **kwargs: calls.append((n, kwargs)))
    for name in [*TORCHRUN, *SLURM]:
        monkeypatch.delenv(name, raising=False)
    processes.launch(print, arguments())
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    processes.launch(print, arguments(num_gpus=8, num_machines=2, machine_rank=1))
    assert [n for n, _ in calls] == [1, 8] and calls[1][1]["machine_rank"] == 1

    for name, value in {**TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun has already started .* leave out --num-gpus"):
        processes.launch(print, arguments(num_gpus=8))
