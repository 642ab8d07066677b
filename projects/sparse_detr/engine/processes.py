"""Starting processes: detectron2's launcher, or those that torchrun or SLURM's srun started."""

import argparse
import contextlib
import gc
import os
import re
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its functions' defaults would keep it for ever
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import UserError
from .signals import EXIT_STATUS, sigterm_reaches_children

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Calls ``main(args)`` in every process of the job.

    With ``--num-gpus`` or ``--num-machines`` above one, detectron2 starts the processes. Otherwise
    this process is one of those that torchrun or ``srun`` has started, or the only one.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < args.num_gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, but torch sees {gpus}: pass --num-gpus {gpus}")
    started = started_process(os.environ)
    if args.num_gpus > 1 or args.num_machines > 1:
        if started and "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError(
                "torchrun has already started the processes: leave out --num-gpus and "
                "--num-machines, or start train_net.py with python"
            )
        started = None
    if started is None:
        several = args.num_gpus > 1  # with one, it is this process that trains
        try:
            with sigterm_reaches_children() if several else contextlib.nullcontext():
                detectron2_launch(
                    main,
                    args.num_gpus,
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(args,),
                )
        except ProcessExitedException as error:
            if error.exit_code != EXIT_STATUS:
                raise
            raise SystemExit(EXIT_STATUS) from None
        except ProcessRaisedException as error:  # it holds the process's traceback as text
            told = re.search(rf"^{UserError.__module__}\.UserError: (.*)", error.msg, re.M | re.S)
            if told is None:
                raise
            raise UserError(told[1].strip()) from None
        return
    os.environ.update(started)
    if torch.cuda.is_available():  # with one visible GPU per task, that one
        torch.cuda.set_device(int(started["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=DEFAULT_TIMEOUT)
    try:
        comm.create_local_process_group(int(started["LOCAL_WORLD_SIZE"]))
        comm.synchronize()
        main(args)
        comm.synchronize()  # nobody leaves while another one still talks
    finally:
        _end_groups()


def _end_groups() -> None:
    """Destroys the process groups and, by letting go of all that refers to them, their threads.

    A thread that gives back a tensor while the interpreter ends aborts the process ("terminate
    called without an active exception").
    """
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()  # models in reference cycles
    dist.destroy_process_group()


def started_process(environ: Mapping[str, str]) -> dict[str, str] | None:
    """torchrun's variables, as torchrun set them or as SLURM's job step implies them.

    None if this process was not started as one of several. A batch script that does not use
    ``srun`` is none of several, whatever it has asked for.
    """
    if all(name in environ for name in _TORCHRUN):
        return {name: environ[name] for name in _TORCHRUN}
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    first_host = re.match(r"(?:[^,\[]|\[[^]]*\])+", environ["SLURM_STEP_NODELIST"])
    first_tasks = re.match(r"\d+", environ["SLURM_STEP_TASKS_PER_NODE"])
    assert first_host and first_tasks
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": first_tasks[0],
        # "gpu[03-05,7],login1" -> "gpu03"
        "MASTER_ADDR": environ.get("MASTER_ADDR", re.sub(r"\[(\d+)[^]]*\]", r"\1", first_host[0])),
        # the same in all tasks of a job, rarely that of another job
        "MASTER_PORT": environ.get("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 20000)),
    }
