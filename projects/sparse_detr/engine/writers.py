"""Where a run's numbers go: the terminal, metrics.json, TensorBoard, Weights & Biases."""

import datetime
import importlib.util
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from ..errors import UserError

# losses of inner layers, denoising and encoder outputs: in metrics.json, too many for a line
_AUXILIARY = re.compile(r"_(\d+|enc|dn)(_|$)")


class ProgressPrinter(CommonMetricPrinter):
    """One line with epoch, iteration, time left, the final layer's losses, learning rate, speed.

    Losses are medians over the last 20 iterations.

    Args:
        max_iter: iterations of the whole run.
        epoch_iters: iterations per epoch; NaN if unknown.
    """

    def __init__(self, max_iter: int, epoch_iters: float) -> None:
        super().__init__(max_iter)
        self._epoch_iters = epoch_iters

    def write(self) -> None:
        storage = get_event_storage()
        histories = storage.histories()
        done = storage.iter + 1
        if storage.iter >= self._max_iter or "total_loss" not in histories:
            return  # called once more after the last step, or after a failure in the first

        def recent(name: str) -> float:
            return histories[name].median(storage.count_samples(name, self._window_size))

        parts = []
        if not math.isnan(self._epoch_iters):
            parts.append(f"epoch {done / self._epoch_iters:.2f}/{self._max_iter / self._epoch_iters:.4g}")
        parts.append(f"iter {done}/{self._max_iter}")
        if "time" in histories:
            seconds = histories["time"].median(1000) * (self._max_iter - done)
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            parts.append(f"eta {datetime.timedelta(seconds=int(seconds))}")
        names = ["total_loss"] + [
            n for n in histories if "loss" in n and n != "total_loss" and not _AUXILIARY.search(n)
        ]
        parts += [f"{name} {recent(name):.4g}" for name in names + ["grad_norm"]]
        if "lr" in histories:
            parts.append(f"lr {histories['lr'].latest():.3g}")
        if "time" in histories:
            parts.append(f"{recent('time'):.3f} s/iter (data {recent('data_time'):.3f})")
        if torch.cuda.is_available():
            parts.append(f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        self.logger.info("  ".join(parts))


class WandbWriter(EventWriter):
    """Sends every number to Weights & Biases under its iteration; ``params`` go to wandb.init."""

    def __init__(self, **params) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"train.wandb.enabled=True needs wandb, which cannot be imported ({error}): pip install wandb"
            ) from error
        self._run = wandb.init(**params)
        self._written = -1

    def write(self) -> None:
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(20).items():
            if iteration > self._written:
                rows[iteration][name] = value
        for iteration in sorted(rows):
            self._run.log(rows[iteration], step=iteration)
            self._written = iteration

    def close(self) -> None:
        self._run.finish()


def build_writers(
    output_dir: str, max_iter: int, epoch_iters: float, wandb: Mapping | None = None
) -> list[EventWriter]:
    """Terminal, ``metrics.json``, TensorBoard event files if tensorboard is installed, and
    Weights & Biases if there are parameters ``wandb`` for it."""
    writers = [
        ProgressPrinter(max_iter, epoch_iters),
        JSONWriter(os.path.join(output_dir, "metrics.json")),
    ]
    if importlib.util.find_spec("tensorboard"):
        writers.append(TensorboardXWriter(output_dir))
    if wandb is not None:
        writers.append(WandbWriter(**{"dir": output_dir, "resume": "allow", **wandb}))
    return writers
