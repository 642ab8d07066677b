"""The best weights of a run, and when to stop looking for better ones."""

import json
import logging
import math
import os

from detectron2.engine import hooks
from detectron2.utils import comm

from ..errors import UserError
from .checkpoint import Checkpointer, replacing
from .trainer import StopTraining

logger = logging.getLogger(__name__)


class BestCheckpoint(hooks.BestCheckpointer):
    """Writes ``model_best.pth`` when an evaluation beats all before it; can end the run early.

    detectron2's hook, with a memory: every evaluation is noted in ``evaluations.json`` of the run's
    folder. A resumed run reads what had been found up to the iteration that it resumes from.
    Register it in every process, behind the evaluation.

    Args:
        period: iterations between two evaluations; 0: only at the end.
        checkpointer: writes the weights that were evaluated; its folder is the run's.
        metric: as metrics.json calls it.
        mode: "max" or "min".
        patience: stop the run after so many evaluations in a row without a new best; None: never.
    """

    def __init__(
        self,
        period: int,
        checkpointer: Checkpointer,
        *,
        metric: str = "bbox/AP",
        mode: str = "max",
        patience: int | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise UserError(f"train.best_checkpoint.mode must be max or min, not {mode!r}")
        if patience is not None and patience < 1:
            raise UserError(f"train.early_stop.patience={patience} must be at least 1, or null")
        if patience and not period:
            raise UserError(
                f"train.early_stop.patience={patience} counts evaluations, but train.eval_period=0 "
                "evaluates only at the end: set train.eval_period"
            )
        super().__init__(period, checkpointer, metric, mode)
        self._logger = logger
        self.patience = patience
        self.record: list[dict] = []  # {"iteration": steps done, metric: value}
        self._path = os.path.join(checkpointer.save_dir, "evaluations.json")

    def before_train(self) -> None:
        self.record = []
        if comm.is_main_process() and self.trainer.start_iter and os.path.isfile(self._path):
            with open(self._path) as file:
                rows = json.load(file)
            self.record = [
                row for row in rows if row["iteration"] <= self.trainer.start_iter and self._val_metric in row
            ]
        self._recall()
        self._stop_if_stale()

    def _best_checking(self) -> None:
        """Called by detectron2's hook after an evaluation."""
        done = min(self.trainer.iter + 1, self.trainer.max_iter)
        latest = self.trainer.storage.latest() if comm.is_main_process() else {}
        if not comm.all_gather(self._val_metric in latest)[0]:
            self._metric_is_missing(latest)
            return
        if comm.is_main_process():
            super()._best_checking()
            self.record = [row for row in self.record if row["iteration"] != done]
            self.record.append({"iteration": done, self._val_metric: latest[self._val_metric][0]})
            with replacing(self._path) as partial, open(partial, "w") as file:
                json.dump(self.record, file, indent=1)
        if done < self.trainer.max_iter:
            self._stop_if_stale()

    def _metric_is_missing(self, latest: dict) -> None:
        problem = (
            f"train.best_checkpoint.metric={self._val_metric} is not among the results: "
            f"{', '.join(name for name in latest if '/' in name) or 'there are none'}"
        )
        if self.patience:
            raise UserError(f"{problem}; train.early_stop.patience={self.patience} needs it")
        logger.warning("%s. No best checkpoint is kept (train.best_checkpoint.enabled=false)", problem)

    def _recall(self) -> None:
        """Sets detectron2's ``best_metric`` and ``best_iter`` from the record."""
        self.best_metric = self.best_iter = None
        for row in self.record:
            value = row[self._val_metric]
            if math.isfinite(value) and (self.best_metric is None or self._compare(value, self.best_metric)):
                self.best_metric, self.best_iter = value, row["iteration"] - 1

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        best = -1 if self.best_iter is None else self.best_iter
        return sum(row["iteration"] - 1 > best for row in self.record)

    def _stop_if_stale(self) -> None:
        if self.patience and comm.all_gather(self.stale >= self.patience)[0]:
            raise StopTraining(
                f"{self._val_metric} has not improved in the last {self.patience} evaluations"
                + (
                    f"; the best, {self.best_metric:.4g} after {self.best_iter + 1} iterations, "
                    "is in model_best.pth"
                    if self.best_iter is not None
                    else ""
                )
            )
