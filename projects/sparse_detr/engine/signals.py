"""SIGTERM, as SLURM and ``timeout`` send it: the run writes a checkpoint and ends."""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator

from detectron2.engine import HookBase
from torch.utils.data import DataLoader

from .trainer import StopTraining, Trainer

EXIT_STATUS = 128 + signal.SIGTERM


class Terminated(StopTraining):
    """The run ends because it was told to."""

    def __init__(self) -> None:
        super().__init__("SIGTERM was received")


class StopOnRequest(HookBase):
    """Ends the run after a step if one of its processes was told to.

    Register it in every process: behind what belongs to a step, such as the schedule, and before what
    takes time, such as an evaluation.
    """

    trainer: Trainer

    def after_step(self) -> None:
        if self.trainer.stop_requested_anywhere:
            raise Terminated


@contextlib.contextmanager
def sigterm_stops(trainer: Trainer) -> Iterator[None]:
    """Within it SIGTERM ends ``trainer``'s run after the step that is under way, or at once in an
    evaluation (``trainer.between_steps``); a second one ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():  # Python takes handlers from no other
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        trainer.stop_requested = True
        if trainer.between_steps:
            raise Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def make_workers_patient(loader: object) -> None:
    """Lets a DataLoader's workers leave a first SIGTERM, which may have gone to the whole group, to the
    process that started them: it would take their death for a failure."""
    if isinstance(loader, DataLoader):
        loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if start is not None:
        start(worker)
