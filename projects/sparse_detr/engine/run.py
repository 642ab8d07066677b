"""Training and evaluation of a LazyConfig: what ``train_net.py`` does."""

import argparse
import logging
import os
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import create_ddp_model, default_setup, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from ..config import resolve_classes, resolve_device
from ..data.check import check_data
from ..data.loader import TrainingBatchSampler, seed_everything
from ..data.register import check_classes
from ..errors import UserError
from .best import BestCheckpoint
from .checkpoint import Checkpointer, replacing, run_checkpoints
from .ema import ModelEMA
from .schedule import RunLength, build_lr_multiplier, build_optimizer
from .trainer import Trainer, amp_dtype
from .writers import build_writers

logger = logging.getLogger(__name__)


def setup(cfg: DictConfig, args: argparse.Namespace) -> None:
    """detectron2's ``default_setup`` (folder, log, config.yaml, seed), and this package's log.

    The number of classes is read from the data where the config leaves it open, so that the
    config.yaml needs no data. A config.yaml that is there stays until ``train`` replaces it: an
    evaluation, or a command that fails, leaves the run's own as it is.
    """
    if not (args.eval_only or args.resume):
        _refuse_old_run(cfg)
    resolve_classes(cfg)
    written = Path(cfg.train.output_dir) / "config.yaml"
    config = written.read_bytes() if written.is_file() else None
    try:
        default_setup(cfg, args)
    finally:
        if config is not None and comm.is_main_process():
            with replacing(str(written)) as partial:
                Path(partial).write_bytes(config)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="sparse_detr")


class Evaluation:
    """The config's test set and evaluator: built once, run on a model any number of times."""

    def __init__(self, cfg: DictConfig) -> None:
        self.loader = instantiate(cfg.dataloader.test)
        # after the loader, which may have registered the set
        self.evaluator = instantiate(cfg.dataloader.evaluator)

    def __call__(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        """The evaluator's results (COCOEvaluator: percent); empty but in the main process."""
        results = inference_on_dataset(model, self.loader, self.evaluator)
        print_csv_format(results)
        return results


def evaluate(cfg: DictConfig, *, resume: bool = False) -> dict[str, dict[str, float]]:
    """Evaluates the run's last checkpoint if ``resume`` and there is one, else
    ``train.init_checkpoint``."""
    resolve_classes(cfg)
    _check_own_data(cfg, "val")
    if not _has_test_set(cfg):
        raise UserError(
            "nothing to evaluate on: pass data.val_json=... and data.val_images=... (the run had none)"
        )
    evaluation = Evaluation(cfg)
    model = _build_model(cfg, "test")
    checkpointer = Checkpointer(model, cfg.train.output_dir)
    checkpointer.class_names = _class_names(cfg.dataloader.test)
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
    """
    if not resume:
        _refuse_old_run(cfg)
    _check_periods(cfg.train)
    resolve_classes(cfg)
    _check_own_data(cfg, "train", "val")
    loader = instantiate(cfg.dataloader.train)
    evaluation = Evaluation(cfg) if _has_test_set(cfg) else None
    if evaluation is None:
        logger.info("no validation set (data.val_json, data.val_images): nothing is evaluated")
    model = _build_model(cfg, "train", *(["test"] if evaluation else []))
    device = next(model.parameters()).device
    if device.type == "cpu" and cfg.train.device == "auto":
        logger.warning("torch sees no GPU: training on the CPU (train.device=cpu says it on purpose)")

    sampler = getattr(loader, "batch_sampler", None)
    known = isinstance(sampler, TrainingBatchSampler)
    size, batch_size = (sampler.size, sampler.total_batch_size) if known else (None, None)
    run = RunLength.from_config(cfg.train, size, batch_size)
    epochs = run.max_iter / run.epoch_iters
    logger.info(
        "training for %d iterations%s; evaluation %s, checkpoint %s",
        run.max_iter,
        f" ({epochs:.4g} epochs of {size} images in batches of {batch_size})" if known else "",
        *(
            f"every {period} iterations" if period else "at the end"
            for period in (run.eval_period, run.checkpoint_period)
        ),
    )

    device_ids = None if device.type == "cpu" else [torch.cuda.current_device()]
    trainer = Trainer(
        model=create_ddp_model(model, device_ids=device_ids, **cfg.train.ddp),
        data_loader=loader,
        optimizer=build_optimizer(cfg.optimizer, model),
        amp=amp_dtype(cfg.train.amp.enabled, cfg.train.amp.dtype, device),
        max_grad_norm=cfg.train.clip_grad.max_norm if cfg.train.clip_grad.enabled else None,
        grad_accumulation=cfg.train.grad_accumulation,
        seed=cfg.train.seed if cfg.train.seed >= 0 else None,
    )
    checkpointer = Checkpointer(model, cfg.train.output_dir, fine_tune=True, trainer=trainer)
    evaluated = model  # not DDP: ranks may hold unlike batch counts
    checkpointer.class_names = _class_names(cfg.dataloader.train)
    results: dict[str, dict[str, float]] = {}

    def evaluate_now() -> dict[str, dict[str, float]]:
        results.update(evaluation(evaluated))
        return results

    schedule = build_lr_multiplier(cfg.lr_multiplier, run)
    trainer.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(scheduler=schedule)])
    if cfg.train.model_ema.enabled:
        ema = ModelEMA(model, decay=cfg.train.model_ema.decay, warmup=cfg.train.model_ema.warmup)
        trainer.register_hooks([ema])
        checkpointer.add_checkpointable("model_ema", ema.average)
        evaluated = ema.average.module
    # Before the evaluation: should that fail, the iterations are not lost.
    period = run.checkpoint_period or run.max_iter + 1  # 0: model_final.pth alone
    keep = cfg.train.checkpointer.max_to_keep
    saving = hooks.PeriodicCheckpointer(checkpointer, period, max_to_keep=keep)
    if comm.is_main_process():
        trainer.register_hooks([saving])
    patience = cfg.train.early_stop.patience
    if evaluation is None and patience:
        raise UserError(
            f"train.early_stop.patience={patience} needs a validation set to see progress on: "
            "pass data.val_json=... and data.val_images=..., or patience=null"
        )
    if evaluation is not None:
        trainer.register_hooks([hooks.EvalHook(run.eval_period, evaluate_now)])
    if evaluation is not None and (cfg.train.best_checkpoint.enabled or patience):
        best_checkpointer = Checkpointer(evaluated, cfg.train.output_dir)
        best_checkpointer.class_names = checkpointer.class_names
        best = BestCheckpoint(
            run.eval_period,
            best_checkpointer,
            metric=cfg.train.best_checkpoint.metric,
            mode=cfg.train.best_checkpoint.mode,
            patience=patience,
        )
        trainer.register_hooks([best])
    if comm.is_main_process():
        wandb = OmegaConf.to_container(cfg.train.wandb.params) if cfg.train.wandb.enabled else None
        writers = build_writers(cfg.train.output_dir, run.max_iter, run.epoch_iters, wandb)
        trainer.register_hooks([hooks.PeriodicWriter(writers, cfg.train.log_period)])

    resume = resume and checkpointer.has_checkpoint()
    loaded = checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start_iter = loaded.get("iteration", -1) + 1 if resume else 0
    saving.recent_checkpoints = checkpointer.saved_before(start_iter)  # max_to_keep counts them
    if comm.is_main_process():
        _save_config(cfg, trainer.seed)
    trainer.train(start_iter, run.max_iter)
    if trainer.stopped and trainer.steps:
        checkpointer.save("model_final", iteration=trainer.iter)
    return results


def _refuse_old_run(cfg: DictConfig) -> None:
    """A new run would overwrite an old one in its folder, file by file."""
    folder = os.path.abspath(cfg.train.output_dir)
    found = run_checkpoints(folder)
    going_on = "--resume goes on with it; " if found else ""
    if not found and os.path.isfile(os.path.join(folder, "model_best.pth")):
        found = ["model_best.pth"]
    if found:
        raise UserError(
            f"{folder} holds a run already ({os.path.basename(found[-1])}): {going_on}for a new run "
            "take another train.output_dir or delete that folder"
        )


def _check_periods(train: DictConfig) -> None:
    for name, least, optional in (
        ("log_period", 1, False),
        ("eval_period", 0, True),
        ("checkpointer.period", 0, True),
        ("checkpointer.max_to_keep", 1, True),
    ):
        value = OmegaConf.select(train, name)
        if value < least if value is not None else not optional:
            raise UserError(f"train.{name}={value} must be at least {least}{', or null' if optional else ''}")


def _save_config(cfg: DictConfig, seed: int) -> None:
    """Writes the config.yaml of the run that begins; a resumed one keeps its seed."""
    if cfg.train.seed >= 0:
        cfg.train.seed = seed
    with replacing(os.path.join(cfg.train.output_dir, "config.yaml")) as partial:
        LazyConfig.save(cfg, partial)


def _build_model(cfg: DictConfig, *splits: str) -> torch.nn.Module:
    """The model on its device; the splits' data, loaded by now, must have its classes."""
    if cfg.train.seed >= 0:
        seed_everything(cfg.train.seed)
    model = instantiate(cfg.model).to(resolve_device(cfg.train.device, "train.device"))
    names = [name for split in splits for name in _dataset_names(cfg.dataloader[split])]
    check_classes(model.num_classes, *names, expected=OmegaConf.select(cfg, "data.classes"))
    for split in splits:
        delivered = OmegaConf.select(cfg.dataloader[split], "mapper.image_format") or "RGB"
        if delivered != getattr(model, "input_format", delivered):
            raise UserError(
                f"dataloader.{split}.mapper delivers {delivered} but the model was made for "
                f"{model.input_format}: pass dataloader.{split}.mapper.image_format="
                f"{model.input_format}"
            )
    return model


def _has_test_set(cfg: DictConfig) -> bool:
    """False for data of one's own (``coco_dataset``) without a validation set."""
    return OmegaConf.select(cfg.dataloader.test, "dataset.json_file", default="") is not None


def _check_own_data(cfg: DictConfig, *splits: str) -> None:
    """``check_data`` for configs with a ``data`` section like ``common/data/custom.py``'s."""
    data = cfg.get("data") or {}
    files = {}
    for split in splits:
        json_file, images = data.get(f"{split}_json"), data.get(f"{split}_images")
        if bool(json_file) != bool(images):
            raise UserError(f"data.{split}_json={json_file} and data.{split}_images={images}: pass both")
        if json_file:
            files[split] = (json_file, images)
    if data.get("check"):
        check_data(**files)


def _dataset_names(loader: DictConfig) -> list[str]:
    names = OmegaConf.select(loader, "dataset.names")
    return [names] if isinstance(names, str) else list(names or [])


def _class_names(loader: DictConfig) -> list[str] | None:
    """Of the loader's data set, which has been loaded."""
    return next((MetadataCatalog.get(n).get("thing_classes") for n in _dataset_names(loader)), None)
