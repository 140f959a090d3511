"""Ray Data as the executor: an actor pool that holds teachers works through the shards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from samlet.engine.leases import TIMEOUT
from samlet.engine.shard_loop import ImageCount, ShardName, Stopped, Work, work_through
from samlet.errors import SamletError

SPARE_CPUS = 2  # logical ones for Ray's own tasks, or as many actors as cores starve them
MOST_DEATHS = 3  # of one actor


class ShardActor:
    """A process with a teacher, as Ray Data calls it: a batch is one shard."""

    def __init__(self, job: str, threads: int, timeout: float, make: Callable[[str], Work[Any]]) -> None:
        torch.set_num_threads(threads)
        self.work, self.timeout = make(job), timeout

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Work until the shard is finished; how many images that took, and an error that ends the run."""
        wanted = {(str(split), int(number)) for split, number in zip(batch["split"], batch["number"], strict=True)}
        images, said = 0, list[str]()

        def advance(number: int) -> None:
            nonlocal images
            images += number

        def tell(kind: str, text: str) -> None:
            if kind == "says":
                said.append(text)

        shards = [shard for shard in self.work.shards if (shard.split, shard.number) in wanted]
        try:
            work_through(self.work, shards, timeout=self.timeout, advance=advance, tell=tell)
        except SamletError as error:
            return {"images": [images], "error": [str(error)], "said": ["\n".join(said)]}
        return {"images": [images], "error": [""], "said": ["\n".join(said)]}


def run_ray(
    job: str,
    make: Callable[[str], Work[Any]],
    actors: int = 2,
    threads: int | None = None,
    *,
    images: int | None = None,
    timeout: float = TIMEOUT,
) -> int:
    """Work through a job in `actors` actors of a Ray cluster, each with `threads` threads (1).

    The cluster is the one that RAY_ADDRESS names; without it, a local one is started for this run, reachable from this
    machine alone. What is finished is known from the store, which is all that a later start needs. Returns 0, or 143
    or 130 after a signal.

    Raises:
        SamletError: Ray is not installed; what an actor met; or an actor died again and again.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise SamletError("the engine ray needs Ray Data: pip install 'samlet[ray]'") from error
    work, threads = make(job), threads or 1
    shards = [shard for shard in work.shards if not work.is_finished(shard)]
    del work  # the actors hold their own
    try:
        with _stopping(), ImageCount(images) as count, _cluster(actors * threads + SPARE_CPUS):
            options: dict[str, Any] = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) else {}
            for row in _rows(shards, actors, (job, threads, timeout, make), {"num_cpus": threads, **options}):
                count.advance(int(row["images"]))
                if row["error"]:
                    raise SamletError(row["error"])
    except Stopped as stop:
        return int(stop.args[0])
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise SamletError(
            f"Ray gave up ({reason}); look for the actors' messages above, or take fewer actors if memory is short, "
            "then run the same command again: what is done is kept"
        ) from error
    return 0


def _rows(
    shards: Sequence[ShardName], actors: int, given: tuple[object, ...], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the actors say of each shard, as it is finished."""
    import ray

    items = [{"split": shard.split, "number": shard.number} for shard in shards]
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = MOST_DEATHS
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ShardActor,
        fn_constructor_args=given,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(items)), max_tasks_in_flight_per_actor=1),
        max_restarts=MOST_DEATHS,
        max_task_retries=MOST_DEATHS,
        **options,
    )
    yield from results.iter_rows()


@contextmanager
def _cluster(cpus: int) -> Iterator[None]:
    """The cluster we are in, or that RAY_ADDRESS names, or our own; no dashboard: it lets anybody in who reaches it."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=True, logging_level="WARNING")
    else:
        ray.init(
            address="local",
            num_cpus=max(cpus, 4),
            include_dashboard=False,
            logging_level="WARNING",
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Stopped` with the exit code; actors are ended wherever they are, and lose an image."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(128 + number)

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
