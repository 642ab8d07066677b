"""Training and evaluation of a LazyConfig: what ``train_net.py`` does."""

import argparse
import copy
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import create_ddp_model, default_setup, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from ..config import config_path, resolve_classes
from ..data.loader import seed_everything
from ..devices import mixed_precision, resolve_device, resolve_dtype
from ..errors import UserError
from ..modeling.meta_arch import SetDetector
from .best import BestCheckpoint
from .checkpoint import Checkpointer, replacing
from .checks import check_folder, check_model, check_own_data, check_periods, class_names, has_test_set
from .elastic import ElasticWarmup
from .ema import ModelEMA
from .optimizer import build_optimizer
from .schedule import RunLength, build_lr_multiplier
from .signals import EXIT_STATUS, StopOnRequest, make_workers_patient, sigterm_stops
from .trainer import Trainer, amp_dtype, training_sampler
from .writers import build_writers

logger = logging.getLogger(__name__)


def setup(cfg: DictConfig, args: argparse.Namespace) -> None:
    """detectron2's ``default_setup`` (folder, log, config.yaml, seed), and this package's log.

    A config.yaml that is there stays until ``train`` replaces it: an evaluation, or a command that
    fails, leaves the run's own as it is.
    """
    if not (args.eval_only or args.resume):
        check_folder(cfg.train.output_dir)
    args = copy.copy(args)
    args.config_file = config_path(args.config_file)  # default_setup logs what is in it
    written = Path(cfg.train.output_dir) / "config.yaml"
    config = written.read_bytes() if written.is_file() else None
    try:
        default_setup(cfg, args)
    finally:
        if config is not None and comm.is_main_process():
            with replacing(str(written)) as partial:
                Path(partial).write_bytes(config)
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is not what matters then
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="sparse_detr")


class Evaluation:
    """The config's test set and evaluator: built once, run on a model any number of times."""

    def __init__(self, cfg: DictConfig) -> None:
        self.loader = instantiate(cfg.dataloader.test)
        # after the loader, which may have registered the set
        self.evaluator = instantiate(cfg.dataloader.evaluator)
        self.dtype = cfg.train.get("eval_dtype", "float32")  # config.yaml of older runs have none

    def __call__(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        """The evaluator's results (COCOEvaluator: percent); empty but in the main process."""
        device = next(model.parameters()).device
        with mixed_precision(device, resolve_dtype(self.dtype, device, "train.eval_dtype")):
            results = inference_on_dataset(model, self.loader, self.evaluator)
        print_csv_format(results)
        return results


def evaluate(cfg: DictConfig, *, resume: bool = False) -> dict[str, dict[str, float]]:
    """Evaluates the run's last checkpoint if ``resume`` and there is one, else
    ``train.init_checkpoint``."""
    resolve_classes(cfg)
    check_own_data(cfg, "val")
    if not has_test_set(cfg):
        raise UserError(
            "nothing to evaluate on: pass data.val_json=... and data.val_images=... (the run had none)"
        )
    evaluation = Evaluation(cfg)
    model = _build_model(cfg, "test")
    checkpointer = Checkpointer(model, cfg.train.output_dir, class_names=class_names(cfg, "test"))
    found, weights = checkpointer.has_checkpoint(), cfg.train.init_checkpoint
    absent = f"no checkpoint in {os.path.abspath(cfg.train.output_dir)}"
    if not found and not weights:
        raise UserError(
            "nothing to evaluate: pass train.init_checkpoint=..., or the train.output_dir of a run "
            f"(there is {absent})"
        )
    fallback = resume and not found
    if fallback:
        logger.warning("%s: evaluating train.init_checkpoint=%s", absent, weights)
    try:
        checkpointer.resume_or_load(weights, resume=found and (resume or not weights))
    except ValueError as error:
        if not fallback:
            raise
        raise UserError(f"{absent}: evaluating train.init_checkpoint={weights}: {error}") from error
    return evaluation(model)


def train(cfg: DictConfig, *, resume: bool = False) -> dict[str, dict[str, float]]:
    """Trains; returns the results of the last evaluation (empty but in the main process).

    Args:
        cfg: sections ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``.
        resume: continue from the last checkpoint of ``train.output_dir``, if there is one; without
            it, one that is there is an error.

    Raises:
        SystemExit: SIGTERM has ended the run; a checkpoint was written, status 143.
        KeyboardInterrupt: with how to go on as its message.
    """
    if not resume:
        check_folder(cfg.train.output_dir)
    data = TrainingData(cfg)
    model = _build_model(cfg, *data.splits)
    trainer = _build_trainer(cfg, model, data.loader)
    checkpointer = Checkpointer(
        model,
        cfg.train.output_dir,
        class_names=class_names(cfg, "train"),
        fine_tune=True,
        trainer=trainer,
    )
    results = _register_hooks(cfg, trainer, checkpointer, data)

    resume = resume and checkpointer.has_checkpoint()
    loaded = checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start_iter = loaded.get("iteration", -1) + 1 if resume else 0
    if comm.is_main_process():
        if resume:
            _log_changes(cfg)
        _save_config(cfg, trainer.seed)
    make_workers_patient(data.loader)
    if data.evaluation is not None:
        make_workers_patient(data.evaluation.loader)
    try:
        with sigterm_stops(trainer):
            trainer.train(start_iter, data.run.max_iter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(checkpointer)) from None
    last = start_iter + trainer.steps - 1
    if trainer.stop_requested and trainer.stopped:
        written = last + 1 == data.run.max_iter or os.path.isfile(
            os.path.join(cfg.train.output_dir, f"model_{last:07d}.pth")
        )
        if trainer.steps and not written:
            checkpointer.save(f"model_{last:07d}", iteration=last)
        logger.info("ended by SIGTERM: %s", _how_to_go_on(checkpointer))
        comm.synchronize()  # who leaves first has the launcher end the others
        raise SystemExit(EXIT_STATUS)
    final = os.path.join(cfg.train.output_dir, "model_final.pth")
    if (trainer.stopped and trainer.steps) or not os.path.isfile(final):  # or found broken, and set aside
        checkpointer.save("model_final", iteration=last)
    return results


def _how_to_go_on(checkpointer: Checkpointer) -> str:
    if newest := checkpointer.newest():
        return f"--resume goes on from {newest}"
    return "there is no checkpoint yet to go on from"


class TrainingData:
    """What a run trains on, what it is evaluated on, and how long it is.

    Attributes:
        loader: of the training set.
        evaluation: on the test set; None if the config has none.
        splits: of the config's ``dataloader`` that are in use.
        run: the length in iterations.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_periods(cfg.train)
        resolve_classes(cfg)
        check_own_data(cfg, "train", "val")
        self.loader = instantiate(cfg.dataloader.train)
        self.evaluation = Evaluation(cfg) if has_test_set(cfg) else None
        self.splits = ["train", "test"] if self.evaluation else ["train"]
        if self.evaluation is None:
            logger.info("no validation set (data.val_json, data.val_images): nothing is evaluated")
            if patience := cfg.train.early_stop.patience:
                raise UserError(
                    f"train.early_stop.patience={patience} needs a validation set to see progress on: "
                    "pass data.val_json=... and data.val_images=..., or patience=null"
                )
        sampler = training_sampler(self.loader)
        size, batch_size = (sampler.size, sampler.total_batch_size) if sampler else (None, None)
        self.run = RunLength.from_config(cfg.train, size, batch_size)
        epochs = self.run.max_iter / self.run.epoch_iters
        logger.info(
            "training for %d iterations%s; evaluation %s, checkpoint %s",
            self.run.max_iter,
            f" ({epochs:.4g} epochs of {size} images in batches of {batch_size})" if sampler else "",
            *(
                f"every {period} iterations" if period else "at the end"
                for period in (self.run.eval_period, self.run.checkpoint_period)
            ),
        )


def _build_model(cfg: DictConfig, *splits: str) -> SetDetector:
    """The model on its device; the splits' data, loaded by now, must be what it takes."""
    device = resolve_device(cfg.train.device, "train.device")
    if cfg.train.seed >= 0:
        seed_everything(cfg.train.seed)
    model = instantiate(cfg.model).to(device)
    check_model(model, cfg, *splits)
    return model


def _build_trainer(cfg: DictConfig, model: torch.nn.Module, loader) -> Trainer:
    """The training step on ``model``'s device."""
    device = next(model.parameters()).device
    if device.type == "cpu" and cfg.train.device == "auto":
        logger.warning("torch sees no GPU: training on the CPU (train.device=cpu says it on purpose)")
    device_ids = None if device.type == "cpu" else [torch.cuda.current_device()]
    return Trainer(
        model=create_ddp_model(model, device_ids=device_ids, **cfg.train.ddp),
        data_loader=loader,
        optimizer=build_optimizer(cfg.optimizer, model),
        amp=amp_dtype(cfg.train.amp.enabled, cfg.train.amp.dtype, device),
        max_grad_norm=cfg.train.clip_grad.max_norm if cfg.train.clip_grad.enabled else None,
        grad_accumulation=cfg.train.grad_accumulation,
        seed=cfg.train.seed if cfg.train.seed >= 0 else None,
    )


class _PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """detectron2's, which in a resumed run counts those that are there towards ``max_to_keep``."""

    def before_train(self) -> None:
        super().before_train()
        self.recent_checkpoints = self.checkpointer.saved_before(self.trainer.start_iter)


def _register_hooks(
    cfg: DictConfig, trainer: Trainer, checkpointer: Checkpointer, data: TrainingData
) -> dict[str, dict[str, float]]:
    """All that happens around the steps, in this order; returns the dict that evaluations fill."""
    run, train, main = data.run, cfg.train, comm.is_main_process()
    schedule = build_lr_multiplier(cfg.lr_multiplier, run)
    trainer.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(scheduler=schedule)])
    if (ratios := checkpointer.model.transformer.encoder.elastic) is not None:
        trainer.register_hooks([ElasticWarmup(ratios, train.elastic_warmup)])

    evaluated = checkpointer.model  # not DDP: ranks may hold unlike batch counts
    if train.model_ema.enabled:
        ema = ModelEMA(evaluated, decay=train.model_ema.decay, warmup=train.model_ema.warmup)
        trainer.register_hooks([ema])
        checkpointer.add_checkpointable("model_ema", ema.average)
        evaluated = ema.average.module

    if main:  # Before the evaluation: should that fail, the iterations are not lost.
        period = run.checkpoint_period or run.max_iter + 1  # 0: model_final.pth alone
        keep = train.checkpointer.max_to_keep
        trainer.register_hooks([_PeriodicCheckpointer(checkpointer, period, max_to_keep=keep)])

    trainer.register_hooks([StopOnRequest()])
    results: dict[str, dict[str, float]] = {}
    if (evaluation := data.evaluation) is not None:

        def evaluate_now() -> dict[str, dict[str, float]]:
            trainer.between_steps = True
            try:
                results.update(evaluation(evaluated))
            finally:
                trainer.between_steps = False
            return results

        trainer.register_hooks([hooks.EvalHook(run.eval_period, evaluate_now)])
        if train.best_checkpoint.enabled or train.early_stop.patience:
            best = BestCheckpoint(
                run.eval_period,
                Checkpointer(evaluated, train.output_dir, class_names=checkpointer.class_names),
                metric=train.best_checkpoint.metric,
                mode=train.best_checkpoint.mode,
                patience=train.early_stop.patience,
            )
            trainer.register_hooks([best])

    if main:
        wandb = OmegaConf.to_container(train.wandb.params) if train.wandb.enabled else None
        assert wandb is None or isinstance(wandb, dict)
        writers = build_writers(train.output_dir, run.max_iter, run.epoch_iters, wandb)
        trainer.register_hooks([hooks.PeriodicWriter(writers, train.log_period)])
    return results


def _log_changes(cfg: DictConfig) -> None:
    """Says where ``cfg`` is not the config.yaml that the run has had so far."""
    path = os.path.join(cfg.train.output_dir, "config.yaml")
    if not os.path.isfile(path):
        return
    with tempfile.TemporaryDirectory() as folder:
        LazyConfig.save(cfg, now := os.path.join(folder, "config.yaml"))
        before, after = (dict(_leaves(_plain_config(file))) for file in (path, now))
    own = ("train.seed", "train.output_dir")  # told elsewhere, and where the folder lies
    changes = [
        f"{key} {before.get(key)} -> {after.get(key)}"
        for key in [*after, *(before.keys() - after.keys())]
        if before.get(key) != after.get(key) and key not in own
    ]
    if changes:
        logger.warning("the run goes on with another config: %s", ", ".join(changes))


def _plain_config(file: str) -> object:
    with open(file) as opened:
        return yaml.unsafe_load(opened)  # the run's own, as LazyConfig.load reads it


def _leaves(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The dotted keys of nested dicts and their values; lists are values."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _save_config(cfg: DictConfig, seed: int) -> None:
    """Writes the config.yaml of the run that begins; a resumed one keeps its seed."""
    if cfg.train.seed >= 0:
        cfg.train.seed = seed
    with replacing(os.path.join(cfg.train.output_dir, "config.yaml")) as partial:
        LazyConfig.save(cfg, partial)
