"""The whole path: train_net.py on a small Deformable DETR and generated images."""

import logging
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.events import JSONWriter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_net  # noqa: E402
from sparse_detr import config, engine  # noqa: E402
from sparse_detr.errors import told_in_one_line  # noqa: E402
from sparse_detr.predictor import build_model  # noqa: E402

from .run_files import detections, metrics, read, same  # noqa: E402

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


def test_a_run_leaves_what_detectron2_users_look_for(finished):
    folder, results = finished
    names = {f.name for f in folder.iterdir()}
    assert {
        "log.txt",
        "metrics.json",
        "config.yaml",
        "last_checkpoint",
        "inference",
        "model_0000002.pth",
        "model_0000005.pth",
        "model_final.pth",
    } <= names
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
    assert "the run goes on with" not in (tmp_path / "log.txt").read_text()


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


def test_a_command_that_fails_leaves_the_config_alone(data, finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match="model_final.pth: the weights are not the model's"):
        run(data, tmp_path, "--resume", "model.transformer.encoder.num_layers=2")
    with pytest.raises(TypeError):
        run(data, tmp_path, "--resume", "train.seed=null")
    assert (tmp_path / "config.yaml").read_text() == before
    run(data, tmp_path, "--resume", "train.log_period=3")
    assert config.load_config(str(tmp_path / "config.yaml")).train.log_period == 3
    assert not list(tmp_path.glob("*.tmp*"))


def contents(folder):
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_new_run_needs_a_folder_of_its_own(data, finished, tmp_path):
    folder, _ = finished
    before = contents(folder)
    message = r"holds a run already \(model_final.pth\): --resume goes on with it; for a new run take"
    with pytest.raises(ValueError, match=message):
        run(data, folder)
    with pytest.raises(ValueError, match=message):
        engine.train(config.load_config(TINY, [f"data.root={data}", f"train.output_dir={folder}"]))
    assert contents(folder) == before
    shutil.copy(folder / "model_best.pth", tmp_path)
    with pytest.raises(ValueError, match=r"\(model_best.pth\): for a new run take"):
        run(data, tmp_path)


@pytest.fixture
def interrupted(finished, tmp_path):
    """The run after three of its six iterations."""
    shutil.copy(finished[0] / "model_0000002.pth", tmp_path)
    return tmp_path


def test_a_resumed_run_follows_the_config_or_says_that_it_does_not(data, interrupted):
    run(data, interrupted, "--resume", "optimizer.lr=1e-5", "optimizer.weight_decay=0.5", "train.seed=7")
    assert metrics(interrupted)[5]["lr"] == pytest.approx(1e-6)  # behind the milestone
    groups = read(interrupted / "model_final.pth")["trainer"]["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-5, 0.1 * 1e-5}
    assert {group["weight_decay"] for group in groups} == {0.5}
    log = (interrupted / "log.txt").read_text()
    assert "lr 0.001 -> 1e-05" in log and "weight_decay 0.0001 -> 0.5" in log and "betas" not in log
    assert "its own seed 42, not with train.seed=7" in log
    assert config.load_config(str(interrupted / "config.yaml")).train.seed == 42


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.params.weight_decay_norm=0.0", "number of parameter groups.*must be as before"),
        ("dataloader.train.total_batch_size=4", "batches of 2 out of 12 images, but .* of 4 out of 12"),
        ("dataloader.train.dataset.num_images=11", "resume with .*total_batch_size=2, or start anew"),
    ],
)
def test_what_would_be_another_run_is_not_resumed(data, interrupted, tmp_path_factory, override, message):
    if "num_images" in override:
        data = tmp_path_factory.mktemp("other")  # the set is drawn once
    with pytest.raises(ValueError, match=f"model_0000002.pth: .*{message}"):
        run(data, interrupted, "--resume", override)
    assert metrics(interrupted) == {}


def test_a_resumed_run_counts_its_checkpoints_on(data, interrupted):
    keep = ["--resume", "train.checkpointer.period=1", "train.checkpointer.max_to_keep=2"]
    run(data, interrupted, *keep, "train.eval_period=0", "train.max_iter=4")
    run(data, interrupted, *keep, "train.eval_period=0", "train.max_iter=6")
    numbered = sorted(f.name for f in interrupted.glob("model_0*.pth"))
    assert numbered == ["model_0000004.pth", "model_0000005.pth"]


def at_step(monkeypatch, iteration, act):
    """``act`` in the middle of a step."""
    forward = engine.Trainer._forward

    def acting(self, *args):
        if self.iter == iteration:
            act()
        return forward(self, *args)

    monkeypatch.setattr(engine.Trainer, "_forward", acting)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_run_with_a_checkpoint_that_it_goes_on_from(data, finished, tmp_path, monkeypatch):
    """Behind the step under way, and exactly."""
    before = signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 1, sigterm)
    with pytest.raises(SystemExit) as error:
        run(data, tmp_path)
    assert error.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert [f.name for f in tmp_path.glob("model_*.pth")] == ["model_0000001.pth"]
    log = (tmp_path / "log.txt").read_text()
    assert "training stops after 2 of 6 iterations: SIGTERM was received" in log
    assert log.splitlines()[-1].endswith(
        f"ended by SIGTERM: --resume goes on from {tmp_path}/model_0000001.pth"
    )
    run(data, tmp_path, "--resume")
    whole, resumed = read(finished[0] / "model_final.pth"), read(tmp_path / "model_final.pth")
    assert same(whole["model"], resumed["model"]) and same(whole["trainer"], resumed["trainer"])


def test_sigterm_in_an_evaluation_does_not_wait_for_its_end(data, tmp_path, monkeypatch):
    ended = []

    def evaluation(self, model):
        sigterm()
        ended.append(True)

    monkeypatch.setattr(engine.run.Evaluation, "__call__", evaluation)
    with pytest.raises(SystemExit):
        run(data, tmp_path, "train.checkpointer.period=0")
    assert not ended and (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_ctrl_c_is_one_line_that_says_how_to_go_on(data, tmp_path, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    for iteration, message in (
        (1, "there is no checkpoint yet to go on from"),
        (4, f"--resume goes on from {tmp_path}/model_0000002.pth"),
    ):
        with monkeypatch.context() as patch:
            at_step(patch, iteration, interrupt)
            with pytest.raises(SystemExit) as error, told_in_one_line():
                run(data, tmp_path)
        assert error.value.code == 130
        assert capsys.readouterr().err.splitlines()[-1] == f"interrupted: {message}"
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_a_full_disk_is_one_line(data, tmp_path, monkeypatch, caplog):
    def full(data, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as error, told_in_one_line():
        run(data, tmp_path)
    assert re.search(
        r"^error: cannot write .*/model_0000002.pth: .*No space left.* \(\d+ MiB are free there, \d+ MiB are "
        r"needed\). There is no checkpoint before it: make room, then start again$",
        error.value.code,
    )
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_a_disk_that_is_full_elsewhere_is_one_line(data, tmp_path, monkeypatch):
    def write(self):
        raise OSError(28, "No space left on device", str(tmp_path / "metrics.json"))

    monkeypatch.setattr(JSONWriter, "write", write)
    with (
        pytest.raises(SystemExit, match="error: .*No space left.*metrics.json.*--resume"),
        told_in_one_line(),
    ):
        run(data, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_training_image_is_one_line(data, tmp_path, tmp_path_factory, num_workers):
    root = tmp_path_factory.mktemp("cut")
    shutil.copytree(data, root, dirs_exist_ok=True)
    for image in root.rglob("train/*.*g"):
        image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(SystemExit) as error, told_in_one_line():
        run(root, tmp_path, f"dataloader.train.num_workers={num_workers}")
    assert error.value.code.startswith("error: cannot read training image ") and "\n" not in error.value.code
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_what_changed_for_a_resumed_run_is_logged(data, interrupted, finished):
    shutil.copy(finished[0] / "config.yaml", interrupted)
    milestones = config.load_config(TINY).lr_multiplier.milestones
    run(data, interrupted, "--resume", "train.epochs=0.75", "lr_multiplier.milestones=[0.25]")
    log = (interrupted / "log.txt").read_text()
    assert "the run goes on with another config: " in log
    assert f"lr_multiplier.milestones {list(milestones)} -> [0.25]" in log
    assert "-> 0.75" in log and "output_dir" not in log.split("another config: ")[1].splitlines()[0]


def test_a_broken_final_checkpoint_is_replaced_and_all_readers_fall_back(data, finished, tmp_path):
    folder, results = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    final = tmp_path / "model_final.pth"
    final.write_bytes(final.read_bytes()[:5000])
    run(data, tmp_path, "--eval-only")  # looks, and changes nothing
    build_model(tmp_path, device="cpu")
    assert final.stat().st_size == 5000
    assert run(data, tmp_path, "--resume") == pytest.approx(results, nan_ok=True)
    whole, resumed = read(folder / "model_final.pth"), read(final)
    assert same(whole["model"], resumed["model"]) and whole["iteration"] == resumed["iteration"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert (tmp_path / "model_final.pth.unreadable").stat().st_size == 5000


def test_period_zero_means_at_the_end(data, tmp_path):
    run(data, tmp_path, "train.checkpointer.period=0", "train.eval_period=0")
    assert sorted(f.name for f in tmp_path.glob("model_*.pth")) == ["model_best.pth", "model_final.pth"]
    assert "evaluation at the end, checkpoint at the end" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.log_period=0", "train.log_period=0 must be at least 1$"),
        ("train.log_period=null", "train.log_period=None must be at least 1$"),
        ("train.checkpointer.max_to_keep=0", "max_to_keep=0 must be at least 1, or null"),
        ("train.checkpointer.period=-1", "checkpointer.period=-1 must be at least 0, or null"),
    ],
)
def test_periods_that_cannot_work_are_refused(data, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path, override)


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


def test_eval_only_in_a_folder_without_a_run_says_what_it_takes(data, finished, tmp_path):
    folder, _ = finished
    weights = read(folder / "model_final.pth")["model"]
    backbone = {k: v for k, v in weights.items() if k.startswith("backbone.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    cfg = config.load_config(str(folder / "config.yaml"))
    cfg.train.init_checkpoint = str(tmp_path / "backbone.pth")
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    command = ["--config-file", str(tmp_path / "config.yaml"), "--eval-only"]
    with pytest.raises(ValueError, match="no checkpoint in /.*/typo: evaluating .*=/.*backbone.pth: "):
        train_net.main(train_net.arguments([*command, f"train.output_dir={tmp_path / 'typo'}"]))
    log = (tmp_path / "typo" / "log.txt").read_text()
    assert f"no checkpoint in {tmp_path / 'typo'}: evaluating train.init_checkpoint=" in log


def test_eval_only_does_not_look_at_the_training_set(data, finished, tmp_path):
    folder, _ = finished
    shutil.copy(folder / "model_final.pth", tmp_path)
    run(data, tmp_path, "--eval-only", "dataloader.train.mapper.image_format=BGR")
    assert detections(tmp_path) == detections(folder)


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
    # Equal detections need equal sums: of as many threads as in `finished`.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "copypaste: AP,AP50,AP75" in done.stdout + done.stderr
    assert detections(tmp_path) == detections(folder)


def test_a_mistake_is_told_in_one_line(monkeypatch, capfd):
    """A UserError; anything else keeps its traceback. By one process, and by one of two."""
    command = [str(ROOT / "train_net.py"), "--config-file", TINY, "train.max_iters=3"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="^error: override 'train.max_iters=3': the config has"):
        runpy.run_path(command[0], run_name="__main__")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^error: override 'train.max_iters=3': the config has[^\n]*$"):
        with told_in_one_line():
            engine.launch(train_net.main, train_net.arguments([*command[1:], "--num-gpus", "2"]))
    assert "Traceback" not in capfd.readouterr().err
