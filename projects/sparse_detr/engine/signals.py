"""SIGTERM, as SLURM and ``timeout`` send it: the run writes a checkpoint and ends."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from detectron2.engine import HookBase
from torch.utils.data import DataLoader

from .trainer import StopTraining, Trainer

EXIT_STATUS = 128 + signal.SIGTERM
# Seconds in which more signals are the same request: one to a whole group reaches a process directly and
# through the launcher that started it.
PATIENCE = 5.0


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
    evaluation (``trainer.between_steps``); one that comes ``PATIENCE`` later ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():  # Python takes handlers from no other
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    first = 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first
        if trainer.stop_requested:
            if time.monotonic() - first > PATIENCE:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            return
        first = time.monotonic()
        trainer.stop_requested = True
        if trainer.between_steps:
            raise Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextlib.contextmanager
def sigterm_reaches_children() -> Iterator[None]:
    """Within it this process, which waits for those it has started, passes SIGTERM on and waits on."""

    def handle(number: int, frame: object) -> None:
        for child in multiprocessing.active_children():
            child.terminate()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def make_workers_patient(loader: object) -> None:
    """Lets a DataLoader's workers outlive a first SIGTERM, which may have gone to the whole group, by
    ``PATIENCE``: the process that started them would take their death for a failure."""
    if isinstance(loader, DataLoader):
        loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    def leave_in_time(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # It may also be an ending process that waits for this one.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    signal.signal(signal.SIGTERM, leave_in_time)
    if start is not None:
        start(worker)
