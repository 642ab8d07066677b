"""One training step, and what must be true before it changes the weights."""

import contextlib
import logging
import math
import re
import time

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from ..data.loader import TrainingBatchSampler, seed_everything
from ..errors import UserError
from ..modeling.criterion import BatchPart

logger = logging.getLogger(__name__)

_AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def amp_dtype(enabled: bool, dtype: str, device: torch.device) -> torch.dtype | None:
    """Checks the config's ``train.amp`` section; None stands for full precision."""
    if not enabled:
        return None
    if dtype not in _AMP_DTYPES:
        raise UserError(f"train.amp.dtype must be bfloat16 or float16, not {dtype!r}")
    if _AMP_DTYPES[dtype] == torch.float16 and device.type != "cuda":
        raise UserError(f"train.amp.dtype=float16 needs a GPU, but train.device is {device}: use bfloat16")
    return _AMP_DTYPES[dtype]


def training_sampler(loader) -> TrainingBatchSampler | None:
    """The sampler of a loader that ``build_train_loader`` has made; others tell less of themselves."""
    sampler = getattr(loader, "batch_sampler", None)
    return sampler if isinstance(sampler, TrainingBatchSampler) else None


class StopTraining(BaseException):
    """Raised by a hook to end a run in good order; the message says why.

    Not an ``Exception``: detectron2 logs those as failures.
    """


class Trainer(SimpleTrainer):
    """SimpleTrainer with mixed precision, clipping, accumulation, a finite-loss guard, exact resume.

    The state of the random generators is a function of (seed, rank, iteration), so that a resumed
    run needs no saved generator state and evaluation in between changes nothing.

    Args:
        model: returns a dict of weighted losses in training; may be wrapped in
            DistributedDataParallel.
        data_loader: endless iterable of list[dict]; resume is exact with ``build_train_loader``'s.
        optimizer: torch optimizer.
        amp: dtype of the autocast forward pass; None for full precision. float16 scales the loss.
        max_grad_norm: gradients are clipped to this global L2 norm; None: not at all.
        grad_accumulation: number of equal parts that a process computes its batch in, one after
            the other; gradients add up to those of the whole batch, see ``BatchPart``.
        seed: non-negative; None draws one (the same in all processes). A resumed run keeps its own.

    Attributes:
        stopped: a hook has ended the run early.
        steps: iterations done by the last ``train``.
        stop_requested: set it to ask for an end after the step under way, see ``signals.py``.
        stop_requested_anywhere: it was set in one of the processes, as of the last step.
        between_steps: something else than training goes on, such as an evaluation.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        amp: torch.dtype | None = None,
        max_grad_norm: float | None = 0.1,
        grad_accumulation: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        if grad_accumulation < 1:
            raise UserError(f"train.grad_accumulation={grad_accumulation} must be at least 1")
        self.device = next(model.parameters()).device
        self.amp = amp
        self.max_grad_norm = max_grad_norm
        self.grad_accumulation = grad_accumulation
        self.seed = comm.shared_random_seed() if seed is None else seed
        self._seed_drawn = seed is None
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=amp == torch.float16)
        self.stopped = False
        self.steps = 0
        self.stop_requested = self.stop_requested_anywhere = self.between_steps = False

    def train(self, start_iter: int, max_iter: int) -> None:
        """Runs iterations [start_iter, max_iter), or fewer if a hook raises ``StopTraining``."""
        self.steps = 0
        if sampler := self._sampler:
            self._check_parts(sampler.total_batch_size // comm.get_world_size())
            sampler.seed, sampler.start_iter = self.seed, start_iter
        elif start_iter:
            logger.warning(
                "the data loader cannot be moved to iteration %d: its order starts anew", start_iter
            )
        try:
            self._train(start_iter, max_iter)
        except StopTraining as reason:
            self.stopped = True
            logger.info(
                "training stops after %d of %d iterations: %s", start_iter + self.steps, max_iter, reason
            )

    def _train(self, start_iter: int, max_iter: int) -> None:
        """detectron2's ``TrainerBase.train``, which would bury what a user has to mend under tracebacks."""
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter += 1
            except StopTraining:
                self.after_train()
                raise
            except BaseException as error:
                if isinstance(error, Exception) and not isinstance(error, UserError):
                    logger.exception("Exception during training:")
                with contextlib.suppress(Exception):  # what fails as well, as on a full disk
                    self.after_train()
                raise
            self.after_train()

    def _next_batch(self) -> list[dict]:
        try:
            return next(self._data_loader_iter)
        except Exception as error:
            # A worker's exception arrives as text, with its traceback.
            told = re.search(r"cannot read training image .*", str(error))
            if told is None:
                raise
            logger.error(told[0])
            if re.search(
                r"OSError|UnidentifiedImageError|SizeMismatchError|DecompressionBomb", _cause(error)
            ):
                raise UserError(f"{told[0]}. Replace the file, or take it out of the annotations") from error
            raise

    @property
    def _sampler(self) -> TrainingBatchSampler | None:
        return training_sampler(self.data_loader)

    def run_step(self) -> None:
        assert self.model.training, "the model was left in eval mode"
        start = time.perf_counter()
        batch = self._next_batch()
        data_time = time.perf_counter() - start

        seed_everything(self.seed, comm.get_rank(), self.iter)
        self.optimizer.zero_grad()
        size = self._check_parts(len(batch))
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        num_objects = sum(len(entry["instances"]) for entry in batch if "instances" in entry)
        losses = []
        for index, part in enumerate(parts):
            with self._sync(index == len(parts) - 1):
                losses.append(self._forward(part, BatchPart(num_objects, len(parts))))
                loss = sum(losses[-1].values()) / len(parts)
                assert isinstance(loss, torch.Tensor), "the model returned no losses"
                self.grad_scaler.scale(loss).backward()
        self.after_backward()
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = clip_grad_norm_(parameters, self.max_grad_norm or math.inf)

        self._check_and_log(parts, losses, grad_norm, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self.steps += 1

    def _check_parts(self, batch_size: int) -> int:
        """Images in each part of a process's batch."""
        if batch_size % self.grad_accumulation:
            raise UserError(
                f"train.grad_accumulation={self.grad_accumulation} must divide the {batch_size} "
                "images that a process has per iteration "
                "(dataloader.train.total_batch_size / number of processes)"
            )
        return batch_size // self.grad_accumulation

    def _sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once per step: in the backward pass of the last part."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _forward(self, batch: list[dict], part: BatchPart) -> dict[str, torch.Tensor]:
        try:
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                # A model that knows no parts can still be trained in whole batches.
                return self.model(batch) if part.num_parts == 1 else self.model(batch, part)
        except FloatingPointError as error:  # the matcher's: it knows no file names
            raise self._not_finite(self._findings(str(error), [batch])) from error

    def _check_and_log(
        self,
        parts: list[list[dict]],
        losses: list[dict[str, torch.Tensor]],
        grad_norm: torch.Tensor,
        data_time: float,
    ) -> None:
        """Stores the losses' mean over parts and processes; raises if anything is not finite."""
        names = list(losses[0])
        packed = [part[name].detach().float() for part in losses for name in names]
        # the one synchronisation with the device
        *values, grad_norm = torch.stack([*packed, grad_norm.float()]).tolist()
        rows = [values[i : i + len(names)] for i in range(0, len(values), len(names))]
        own = {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows))}
        broken = {name: own[name] for name in names if not math.isfinite(own[name])}
        if not broken and not math.isfinite(grad_norm) and not self.grad_scaler.is_enabled():
            broken = {"grad_norm": grad_norm}
        lines = []
        if broken:
            found = ", ".join(f"{name} = {value}" for name, value in broken.items())
            bad = [part for part, row in zip(parts, rows) if not all(map(math.isfinite, row))]
            lines = self._findings(found, bad or parts)

        gathered = comm.all_gather((own, data_time, lines, self.stop_requested))
        if any(lines for _, _, lines, _ in gathered):
            raise self._not_finite([line for _, _, lines, _ in gathered for line in lines])

        self.stop_requested_anywhere = any(requested for *_, requested in gathered)
        mean = {name: sum(losses[name] for losses, *_ in gathered) / len(gathered) for name in own}
        self.storage.put_scalars(
            total_loss=sum(mean.values()),
            grad_norm=grad_norm,
            data_time=max(seconds for _, seconds, *_ in gathered),
            **mean,
        )

    def _findings(self, found: str, parts: list[list[dict]]) -> list[str]:
        """What was found for which images, and what in them or in the weights is not finite."""
        entries = [entry for part in parts for entry in part]
        lines = [f"process {comm.get_rank()}: {found}", f"  images: {', '.join(map(_name, entries))}"]
        for what, value in (
            ("pixels", lambda entry: entry["image"]),
            ("boxes", lambda entry: entry["instances"].gt_boxes.tensor),
        ):
            try:
                bad = [_name(entry) for entry in entries if not value(entry).isfinite().all()]
            except (KeyError, AttributeError):  # not a detector's batch
                continue
            if bad:
                lines.append(f"  the {what} of {', '.join(bad)} are not finite")
        weights = [n for n, p in self.model.named_parameters() if not p.isfinite().all()]
        if weights:
            shown = ", ".join(weights[:3]) + (", ..." if len(weights) > 3 else "")
            lines.append(f"  {len(weights)} of the weights are not finite themselves: {shown}")
        return lines

    def _not_finite(self, lines: list[str]) -> FloatingPointError:
        return FloatingPointError(
            f"training stopped at iteration {self.iter}, before the weights were changed:\n"
            + "\n".join(lines)
            + "\nLook at these images' boxes and pixels; a lower optimizer.lr, a longer warm-up or "
            "train.amp.enabled=False help when the data are sound."
        )

    def _stream(self) -> tuple[int, int] | None:
        """Total batch size and number of images: what an iteration and an epoch are."""
        return (self._sampler.total_batch_size, self._sampler.size) if self._sampler else None

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "seed": self.seed,
            "stream": self._stream(),
            "grad_scaler": self.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on where ``state_dict`` was taken, with this optimizer's settings and its own seed.

        Raises:
            ValueError: iterations or the optimizer's groups of parameters mean something else now.
        """
        stored, own = state_dict.get("stream"), self._stream()
        if stored and own and tuple(stored) != own:
            raise UserError(
                "this run counts iterations in batches of {} out of {} images, but the config has "
                "batches of {} out of {}: resume with the same data and "
                "dataloader.train.total_batch_size={}, or start anew from its weights "
                "(train.init_checkpoint=<this file>, another train.output_dir)".format(
                    *stored, *own, stored[0]
                )
            )
        settings = [_settings(group) for group in self.optimizer.param_groups]
        try:
            super().load_state_dict(state_dict)
            self._put_back(settings)
        except ValueError as error:  # torch's: it knows no config
            raise UserError(
                f"the optimizer is not the one that the run began with ({error}). To resume, these "
                "must be as before: optimizer._target_, which parameters are trained, and which of "
                "them share a learning rate and a weight decay (optimizer.params). Or start anew "
                "from the weights (train.init_checkpoint=<this file>, another train.output_dir)"
            ) from error
        if state_dict["seed"] != self.seed and not self._seed_drawn:
            logger.warning(
                "the run goes on with its own seed %d, not with train.seed=%d", state_dict["seed"], self.seed
            )
        self.seed = state_dict["seed"]
        if state_dict["grad_scaler"]:  # empty if the earlier run did not scale
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _put_back(self, settings: list[dict]) -> None:
        """Undoes what loading did to the groups' settings; the log says where they differ."""
        changes: dict[str, None] = {}
        for group, own in zip(self.optimizer.param_groups, settings):
            stored = _settings(group)
            if missing := own.keys() - stored.keys():
                raise ValueError(f"it had no {', '.join(sorted(missing))}")
            for name in [name for name in own if own[name] != stored[name]]:
                changes[f"{name} {stored[name]} -> {own[name]}"] = None
                group[name] = own[name]
                if name == "lr":  # the schedule starts from here
                    group["initial_lr"] = own[name]
        if changes:
            logger.warning("the run goes on with other settings of the optimizer: %s", ", ".join(changes))


def _settings(group: dict) -> dict:
    """A parameter group's settings; its learning rate before the schedule's multiplier."""
    settings = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
    return {**settings, "lr": group.get("initial_lr", group["lr"])}


def _cause(error: BaseException) -> str:
    """The types of an exception and of what caused it; of a worker's, its traceback."""
    causes = [error, error.__cause__] if error.__cause__ else [error]
    return " ".join([*(kind.__name__ for e in causes for kind in type(e).__mro__), str(error)])


def _name(entry: dict) -> str:
    return f"{entry.get('image_id')} ({entry.get('file_name')})"
