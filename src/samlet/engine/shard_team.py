"""Several processes of this machine that work through shards: watched, stopped together, replaced when they die."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from samlet.engine.shard_loop import ImageCount, Stopped, Work, work_through
from samlet.engine.signals import leave_signals_to_the_run
from samlet.errors import SamletError

if TYPE_CHECKING:
    from multiprocessing.context import ForkContext, SpawnContext
    from multiprocessing.process import BaseProcess

CONTEXT: SpawnContext | ForkContext = multiprocessing.get_context("spawn")  # CUDA and threads survive no fork
MOST_DEATHS = 3  # of workers at one shard


class Order(NamedTuple):
    """What a worker is started with."""

    job: str
    threads: int
    timeout: float
    gpu: str | None
    make: Callable[[str], Work[Any]]


def take_gpu(gpu: str | None) -> None:
    """Let this process see one GPU only; CUDA reads it at its first use, threads and all."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _work(connection: Connection, order: Order) -> None:
    """A worker's life. It tells of images, of waiting and of an error; anything it hears, even the end, means stop."""
    leave_signals_to_the_run(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    take_gpu(order.gpu)
    torch.set_num_threads(order.threads)

    def tell(**news: int | str) -> None:
        try:
            connection.send_bytes(json.dumps(news).encode())
        except OSError as error:  # whoever started us is gone
            raise Stopped from error

    def advance(images: int) -> None:
        if images:
            tell(images=images)
        if connection.poll():
            raise Stopped

    try:
        work = order.make(order.job)
        work_through(work, timeout=order.timeout, advance=advance, tell=lambda kind, text: tell(**{kind: text}))
    except Stopped:
        pass
    except SamletError as error:
        tell(error=str(error))


class _Worker:
    """A process that works, and what has been heard of it."""

    def __init__(self, index: int, order: Order) -> None:
        self.index, self.shard, self.waits, self.error = index, "", "", ""
        self.said: list[str] = []
        self.connection, its_end = CONTEXT.Pipe()
        self.process: BaseProcess = CONTEXT.Process(target=_work, args=(its_end, order), name=f"extract {index}")
        signals = {signal.SIGINT, signal.SIGTERM}
        resource_tracker.ensure_running()  # which unblocks signals when it is started
        former = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # it is born deaf to a Ctrl-C
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        its_end.close()

    def hear(self) -> int:
        """Images it has committed since it was last heard."""
        images = 0
        with suppress(EOFError, ConnectionResetError):
            while self.connection.poll():
                news = json.loads(self.connection.recv_bytes())
                images += news.get("images", 0)
                self.error = news.get("error", self.error)
                self.waits = news.get("waits", "")
                self.shard = news.get("shard", self.shard)
                self.said += [news["says"]] if "says" in news else []
        return images

    def stop(self) -> None:
        with suppress(OSError):  # it has ended
            self.connection.send_bytes(b"stop")

    def end(self) -> None:
        """Leave nothing of it, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Team:
    """Workers of this machine: whoever dies is replaced, unless they die again and again."""

    def __init__(self, size: int, order: Callable[[int], Order], count: ImageCount) -> None:
        self._order, self._count = order, count
        self.workers = [_Worker(index, order(index)) for index in range(size)]
        self._deaths, self._error, self._stopping = Counter[str](), "", False

    def work(self, asked_to_stop: Callable[[], bool]) -> None:
        """Until all have ended.

        Raises:
            SamletError: what a worker met; or worker after worker died.
        """
        try:
            while self.workers:
                wait([end for worker in self.workers for end in (worker.connection, worker.process.sentinel)], 0.2)
                if asked_to_stop():
                    self._stop()
                self.workers = [now for worker in self.workers if (now := self._look_after(worker)) is not None]
                if self.workers and all(worker.waits for worker in self.workers):
                    self._count.say(self.workers[0].waits)
        finally:
            for worker in self.workers:
                worker.end()
        if self._error:
            raise SamletError(self._error)

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            for worker in self.workers:
                worker.stop()

    def _look_after(self, worker: _Worker) -> _Worker | None:
        """The worker, or the one in its place, or None where there is nothing left to do."""
        alive = worker.process.is_alive()
        self._count.advance(worker.hear())
        while worker.said:
            self._count.say(worker.said.pop(0))
        if alive:
            return worker
        code = worker.process.exitcode
        worker.end()
        if worker.error:
            self._fail(worker.error)
        elif code and not self._stopping:
            self._deaths[worker.shard] += 1
            if self._deaths[worker.shard] < MOST_DEATHS:
                return _Worker(worker.index, self._order(worker.index))
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            where = f"at shard {worker.shard}" if worker.shard else "before their first shard"
            self._fail(
                f"{MOST_DEATHS} extracting processes died {where} (the last: {how}); look for their messages above, or "
                "take fewer processes if memory is short, then run the same command again: what is done is kept"
            )
        return None

    def _fail(self, error: str) -> None:
        self._error = self._error or error
        self._stop()
