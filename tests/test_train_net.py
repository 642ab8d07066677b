"""The whole path: train_net.py on a small Deformable DETR and generated images."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.evaluation.testing import flatten_results_dict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_net  # noqa: E402
from sparse_detr import config, engine  # noqa: E402

TINY = str(ROOT / "tests" / "engine" / "tiny_shapes.py")  # six iterations


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def run(data, output_dir, *arguments):
    command = ["--config-file", TINY, f"data.root={data}", f"train.output_dir={output_dir}", *arguments]
    return flatten_results_dict(train_net.main(train_net.arguments(command)))


def test_flags_may_stand_before_and_after_overrides():
    args = train_net.arguments(["a.b=1", "--resume", "+c=x", "--num-gpus", "2", "--config-file", "x.py"])
    assert (args.resume, args.num_gpus, args.config_file) == (True, 2, "x.py")
    assert args.opts == ["a.b=1", "+c=x"]


def test_a_config_may_have_an_equals_sign_in_its_path():
    args = train_net.arguments(["a.b=1", "--config-file", "run=1/config.yaml"])
    assert (args.config_file, args.opts) == ("run=1/config.yaml", ["a.b=1"])


def test_runs_on_one_machine_take_a_free_port():
    """detectron2's default is one port per user."""
    assert train_net.arguments([]).dist_url == "auto"
    assert train_net.arguments(["--dist-url", "tcp://127.0.0.1:5"]).dist_url == "tcp://127.0.0.1:5"
    assert train_net.arguments(["--num-machines", "2"]).dist_url.startswith("tcp://")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--num-gpus 4, but torch sees 2: pass --num-gpus 2"):
        engine.launch(print, train_net.arguments(["--num-gpus", "4"]))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run: its folder and the results it returned."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(data, folder)


def metrics(folder):
    rows = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["iteration"], {}).update(row)
    return rows


def same(first, second):
    """Bitwise equality of nested checkpoint contents."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def read(path):
    return torch.load(path, weights_only=True)


def detections(folder):
    return json.loads((folder / "inference" / "coco_instances_results.json").read_text())


def test_a_run_leaves_what_detectron2_users_look_for(finished):
    folder, results = finished
    names = {f.name for f in folder.iterdir()}
    assert {
        "log.txt", "metrics.json", "config.yaml", "last_checkpoint", "inference",
        "model_0000002.pth", "model_0000005.pth", "model_final.pth",
    } <= names  # fmt: skip
    assert (folder / "inference" / "coco_instances_results.json").is_file()
    rows = metrics(folder)
    assert "bbox/AP" in rows[3] and "bbox/AP" in rows[6]  # after 4 iterations, and at the end
    assert {"loss_class", "loss_bbox_0", "loss_giou_enc", "grad_norm", "lr"} <= rows[5].keys()
    assert {"bbox/AP", "bbox/AP50", "bbox/AP-star"} <= results.keys()


def test_the_log_tells_epoch_iteration_time_left_and_losses(finished):
    folder, _ = finished
    log = (folder / "log.txt").read_text()
    assert "training for 6 iterations (1 epochs of 12 images in batches of 2)" in log
    assert "training images have no object" in log
    assert "lr 0.001, weight decay 0.0001" in log
    (line,) = [x for x in log.splitlines() if "iter 4/6" in x]
    for part in ("epoch 0.67/1 ", "eta 0:00:0", "total_loss ", "loss_giou ", "grad_norm ", "lr "):
        assert part in line
    assert "loss_giou_0" not in line and "loss_giou_enc" not in line


def test_resume_equals_an_uninterrupted_run(data, finished, tmp_path):
    """Bitwise: weights, optimizer and detections. That no evaluation took place changes nothing."""
    folder, _ = finished
    shutil.copy(folder / "model_0000002.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    run(data, tmp_path, "--resume", "train.eval_period=0")
    assert min(metrics(tmp_path)) == 3
    whole, resumed = read(folder / "model_final.pth"), read(tmp_path / "model_final.pth")
    assert whole["model"].keys() == resumed["model"].keys()
    assert same(whole["model"], resumed["model"])
    assert same(whole["trainer"], resumed["trainer"])
    assert detections(tmp_path) == detections(folder)


def test_resume_survives_a_truncated_checkpoint(data, finished, tmp_path, caplog):
    folder, _ = finished
    for name in ("model_0000002.pth", "model_0000005.pth"):
        shutil.copy(folder / name, tmp_path)
    cut = tmp_path / "model_0000005.pth"
    cut.write_bytes(cut.read_bytes()[:5000])
    (tmp_path / "last_checkpoint").write_text(cut.name)
    with caplog.at_level(logging.ERROR):
        run(data, tmp_path, "--resume")
    assert "cannot read" in caplog.text
    whole, resumed = read(folder / "model_final.pth"), read(tmp_path / "model_final.pth")
    assert same(whole["model"], resumed["model"])


def test_resuming_a_finished_run_only_evaluates(data, finished, tmp_path):
    folder, results = finished
    shutil.copy(folder / "model_final.pth", tmp_path)
    assert run(data, tmp_path, "--resume") == pytest.approx(results, nan_ok=True)
    assert detections(tmp_path) == detections(folder)
    assert not (tmp_path / "model_0000005.pth").exists()


def test_eval_only_repeats_the_evaluation_of_the_run(data, finished, tmp_path):
    folder, results = finished
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    assert run(data, tmp_path / "a", "--eval-only", weights) == pytest.approx(results, nan_ok=True)
    assert detections(tmp_path / "a") == detections(folder)

    (tmp_path / "b").mkdir()  # the output folder's own checkpoint
    shutil.copy(folder / "model_final.pth", tmp_path / "b")
    run(data, tmp_path / "b", "--eval-only")
    assert detections(tmp_path / "b") == detections(folder)


def test_eval_only_takes_the_run_not_what_its_training_started_from(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    cfg = config.load_config(str(folder / "config.yaml"))
    cfg.train.output_dir, cfg.train.init_checkpoint = str(tmp_path / "run"), "backbone.pkl"
    LazyConfig.save(cfg, str(tmp_path / "run" / "config.yaml"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    command = ["--config-file", str(tmp_path / "run" / "config.yaml"), "--eval-only"]
    train_net.main(train_net.arguments([*command, "model.max_detections=50"]))
    assert detections(tmp_path / "run") == detections(folder)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_eval_only_without_weights_says_what_to_pass(data, tmp_path):
    with pytest.raises(ValueError, match="nothing to evaluate: pass train.init_checkpoint"):
        run(data, tmp_path, "--eval-only")


def test_a_moving_average_is_what_gets_evaluated_and_kept_as_the_best(data, tmp_path):
    """In the run, as model_best.pth, and by --eval-only with either file."""
    ema = "train.model_ema.enabled=true"
    run(data, tmp_path / "a", ema, "train.model_ema.warmup=2", "train.eval_period=0")
    final, best = (read(tmp_path / "a" / f"model_{name}.pth") for name in ("final", "best"))
    average = {k.removeprefix("module."): v for k, v in final["model_ema"].items()}
    assert average.pop("n_averaged") == 6 and same(average, dict(best["model"]))
    assert not same(dict(final["model"]), dict(best["model"]))
    assert (tmp_path / "a" / "last_checkpoint").read_text() == "model_final.pth"
    for name in ("final", "best"):
        weights = f"train.init_checkpoint={tmp_path / 'a' / f'model_{name}.pth'}"
        run(data, tmp_path / name, "--eval-only", weights)
        assert detections(tmp_path / name) == detections(tmp_path / "a")


def test_early_stopping_ends_in_good_order(data, tmp_path):
    """Resumed, the run stops again at once: a queue that restarts jobs does not train on."""
    early = ["train.eval_period=1", "train.early_stop.patience=1"]  # AP stays 0
    assert run(data, tmp_path, *early)["bbox/AP"] == 0
    assert "training stops after 2 of 6 iterations" in (tmp_path / "log.txt").read_text()
    assert read(tmp_path / "model_final.pth")["iteration"] == 1 and max(metrics(tmp_path)) == 1
    run(data, tmp_path, "--resume", *early)
    assert max(metrics(tmp_path)) == 1
    assert read(tmp_path / "model_final.pth")["iteration"] == 1  # no step was taken
    assert (tmp_path / "log.txt").read_text().count("training stops after 2 of 6 iterations") == 2
    run(data, tmp_path, "--resume", "train.eval_period=1", "train.early_stop.patience=9")
    assert max(metrics(tmp_path)) == 6


def test_the_saved_config_runs_again(finished, tmp_path):
    folder, _ = finished
    cfg = config.load_config(str(folder / "config.yaml"))
    cfg.train.output_dir = str(tmp_path)
    cfg.train.init_checkpoint = str(folder / "model_final.pth")
    engine.evaluate(cfg)
    assert detections(tmp_path) == detections(folder)


def test_a_wrong_class_count_stops_before_the_first_step(data, tmp_path):
    with pytest.raises(ValueError, match="'shapes_train' has 5 classes .*pass model.num_classes=5"):
        run(data, tmp_path, "model.num_classes=80")
    assert not (tmp_path / "metrics.json").exists()


def test_pixels_in_the_wrong_order_are_noticed(data, tmp_path):
    with pytest.raises(ValueError, match="train.mapper delivers BGR .* made for RGB"):
        run(data, tmp_path, "dataloader.train.mapper.image_format=BGR")


def test_a_mistyped_override_stops_at_once(data, tmp_path):
    with pytest.raises(ValueError, match="Did you mean .*train.max_iter"):
        run(data, tmp_path, "train.max_iters=3")
    assert not list(tmp_path.iterdir())


def test_absent_data_are_named(tmp_path):
    cfg = config.load_config(str(ROOT / "configs" / "common" / "data" / "coco.py"))
    tiny = config.load_config(TINY, [f"train.output_dir={tmp_path}"])
    tiny.dataloader.train.dataset = cfg.dataloader.train.dataset
    tiny.dataloader.train.dataset.names = "coco_2017_trian"
    with pytest.raises(ValueError, match="Did you mean coco_2017_train"):
        engine.train(tiny)


def test_an_absent_gpu_is_explained(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU: pass train.device=cpu"):
        run(data, tmp_path / "a", "train.device=cuda")
    run(data, tmp_path / "b", "train.device=auto", "train.max_iter=1")
    assert "torch sees no GPU: training on the CPU" in (tmp_path / "b" / "log.txt").read_text()


def test_bfloat16_trains_on_the_cpu(data, tmp_path):
    run(data, tmp_path, "train.amp.enabled=true", "train.max_iter=2")
    weights = read(tmp_path / "model_final.pth")["model"]
    assert all(torch.isfinite(v).all() for v in weights.values())


def test_the_script_runs_by_itself(data, finished, tmp_path):
    """From another folder, as a user would, without the package being installed."""
    folder, _ = finished
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", TINY, "--eval-only"]
    command += [f"data.root={data}", f"train.output_dir={tmp_path}"]
    command += [f"train.init_checkpoint={folder / 'model_final.pth'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "copypaste: AP,AP50,AP75" in done.stdout + done.stderr
    assert detections(tmp_path) == detections(folder)


def test_a_mistake_is_told_in_one_line(tmp_path):
    """A UserError; anything else keeps its traceback."""
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", TINY, "train.max_iters=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: override 'train.max_iters=3': the config has")
