"""Who works through the shards: this process, several on this machine, any number of machines on a shared folder.

A launcher needs nothing more: each of torchrun's ranks and of SLURM's tasks runs the same command, and leases in the
store's folder share the work. `run_ray` lets Ray Data start the processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from samlet.engine.executors_ray import run_ray
from samlet.engine.leases import TIMEOUT
from samlet.engine.shard_loop import ImageCount, Stopped, Work, work_through
from samlet.engine.shard_team import Order, Team, take_gpu
from samlet.engine.signals import listen_for_stop

__all__ = ["run_local", "run_ray", "work_through"]


def run_local(
    job: str,
    make: Callable[[str], Work[Any]],
    processes: int = 1,
    threads: int | None = None,
    *,
    images: int | None = None,
    timeout: float = TIMEOUT,
) -> int:
    """Work through a job in `processes` processes of this machine (one: this one), each with `threads` threads (1).

    `make` makes of the job what a process works on; `images` is how many are missing, for the ETA. Returns the exit
    code: 0, or 143 or 130 after a signal, when all that was computed is committed. Each process takes the next of the
    GPUs that are visible.

    Raises:
        SamletError: what a worker met; or worker after worker died.
    """
    with listen_for_stop() as stop, ImageCount(images) as count:
        if processes > 1:
            team = Team(processes, lambda index: Order(job, threads or 1, timeout, _gpu(index, processes), make), count)
            team.work(lambda: stop.signal is not None)
            return stop.exit_code

        def advance(number: int) -> None:
            count.advance(number)
            if stop.signal is not None:
                raise Stopped

        with suppress(Stopped), _on_threads(threads or 1):
            take_gpu(_gpu(0, 1))
            work_through(make(job), timeout=timeout, advance=advance, tell=count.tell)
        return stop.exit_code


@contextmanager
def _on_threads(threads: int) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _gpu(index: int, processes: int) -> str | None:
    """The visible GPU of one of the processes that a launcher's task starts; None where there is none to choose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else [str(gpu) for gpu in range(torch.cuda.device_count())]
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return gpus[(rank * processes + index) % len(gpus)] if len(gpus) > 1 else None
