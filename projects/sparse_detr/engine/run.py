"""Training and evaluation of a LazyConfig: what ``train_net.py`` does."""

import argparse
import logging
import os

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import create_ddp_model, default_setup, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from ..data.loader import TrainingBatchSampler, seed_everything
from ..data.register import check_num_classes
from .checkpoint import Checkpointer
from .schedule import RunLength, build_lr_multiplier, build_optimizer
from .trainer import Trainer, amp_dtype
from .writers import build_writers

logger = logging.getLogger(__name__)


def setup(cfg: DictConfig, args: argparse.Namespace) -> None:
    """detectron2's ``default_setup`` (folder, log, config.yaml, seed), and this package's log."""
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="sparse_detr")


def resolve_device(name: str) -> torch.device:
    """``train.device``: "auto" is the GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"train.device={name}, but torch sees no GPU: pass train.device=cpu")
    return torch.device(name)


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
    """Evaluates ``train.init_checkpoint`` or, if empty or ``resume``, the run's last one."""
    evaluation = Evaluation(cfg)
    model = _build_model(cfg)
    checkpointer = Checkpointer(model, cfg.train.output_dir)
    resume = resume or not cfg.train.init_checkpoint
    if resume and not checkpointer.has_checkpoint():
        raise ValueError(
            "nothing to evaluate: pass train.init_checkpoint=..., or the train.output_dir of a run "
            f"(there is no checkpoint in {os.path.abspath(cfg.train.output_dir)})"
        )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return evaluation(model)


def train(cfg: DictConfig, *, resume: bool = False) -> dict[str, dict[str, float]]:
    """Trains; returns the results of the last evaluation (empty but in the main process).

    Args:
        cfg: sections ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``.
        resume: continue from the last checkpoint of ``train.output_dir``, if there is one.
    """
    loader = instantiate(cfg.dataloader.train)
    evaluation = Evaluation(cfg)
    model = _build_model(cfg)
    device = next(model.parameters()).device

    sampler = getattr(loader, "batch_sampler", None)
    known = isinstance(sampler, TrainingBatchSampler)
    size, batch_size = (sampler.size, sampler.total_batch_size) if known else (None, None)
    run = RunLength.from_config(cfg.train, size, batch_size)
    epochs = run.max_iter / run.epoch_iters
    logger.info(
        "training for %d iterations%s; evaluation every %d, checkpoint every %d iterations",
        run.max_iter,
        f" ({epochs:.4g} epochs of {size} images in batches of {batch_size})" if known else "",
        run.eval_period,
        run.checkpoint_period,
    )

    ddp = {"device_ids": None} if device.type == "cpu" else {}
    trainer = Trainer(
        model=create_ddp_model(model, **{**cfg.train.ddp, **ddp}),
        data_loader=loader,
        optimizer=build_optimizer(cfg.optimizer, model),
        amp=amp_dtype(cfg.train.amp.enabled, cfg.train.amp.dtype, device),
        max_grad_norm=cfg.train.clip_grad.max_norm if cfg.train.clip_grad.enabled else None,
        seed=cfg.train.seed if cfg.train.seed >= 0 else None,
    )
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer)
    for name in _dataset_names(cfg.dataloader.train)[:1]:
        checkpointer.class_names = MetadataCatalog.get(name).get("thing_classes")
    results: dict[str, dict[str, float]] = {}

    def evaluate_now() -> dict[str, dict[str, float]]:
        results.update(evaluation(model))  # not DDP: ranks may hold unlike batch counts
        return results

    schedule = build_lr_multiplier(cfg.lr_multiplier, run)
    trainer.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(scheduler=schedule)])
    if comm.is_main_process():
        keep = cfg.train.checkpointer.max_to_keep
        trainer.register_hooks(
            [hooks.PeriodicCheckpointer(checkpointer, run.checkpoint_period, max_to_keep=keep)]
        )
    trainer.register_hooks([hooks.EvalHook(run.eval_period, evaluate_now)])
    if comm.is_main_process():
        writers = build_writers(cfg.train.output_dir, run.max_iter, run.epoch_iters)
        trainer.register_hooks([hooks.PeriodicWriter(writers, cfg.train.log_period)])

    resume = resume and checkpointer.has_checkpoint()
    loaded = checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start_iter = loaded.get("iteration", -1) + 1 if resume else 0
    trainer.train(start_iter, run.max_iter)
    return results


def _build_model(cfg: DictConfig) -> torch.nn.Module:
    """The model on its device; the data sets, loaded by now, must have its number of classes."""
    if cfg.train.seed >= 0:
        seed_everything(cfg.train.seed)
    model = instantiate(cfg.model).to(resolve_device(cfg.train.device))
    names = [name for split in ("train", "test") for name in _dataset_names(cfg.dataloader[split])]
    check_num_classes(model.num_classes, *names)
    for split in ("train", "test"):
        delivered = OmegaConf.select(cfg.dataloader[split], "mapper.image_format") or "RGB"
        if delivered != getattr(model, "input_format", delivered):
            raise ValueError(
                f"dataloader.{split}.mapper delivers {delivered} but the model was made for "
                f"{model.input_format}: pass dataloader.{split}.mapper.image_format="
                f"{model.input_format}"
            )
    return model


def _dataset_names(loader: DictConfig) -> list[str]:
    names = OmegaConf.select(loader, "dataset.names")
    return [names] if isinstance(names, str) else list(names or [])
