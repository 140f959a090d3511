"""The one loop that works through shards, whoever runs it: claim, extract, go on until none is left.

Executors only start processes that run it; leases keep them apart, on one machine or many. Nothing that is computed
depends on who computes it: each process computes one image after the other with the same number of threads.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self, TypeVar

from samlet.data.streams import name_index
from samlet.engine.leases import TIMEOUT, Leases, LostLease
from samlet.engine.progress import ImageBars

LEASES = ".leases"  # in the store
PAUSE = 1.0  # seconds between two looks at shards that others hold


class ShardName(Protocol):
    """A piece of the work."""

    @property
    def split(self) -> str:
        """Train or val."""
        ...

    @property
    def number(self) -> int:
        """Within the split."""
        ...


Name = TypeVar("Name", bound=ShardName)


class Work(Protocol[Name]):
    """Shards, and how one is extracted: what samlet.extraction.Extractor is to an executor."""

    store: Path

    @property
    def shards(self) -> tuple[Name, ...]:
        """All pieces of the job, in order."""
        ...

    def is_finished(self, shard: Name) -> bool:
        """Whether everything that belongs to a shard is committed."""
        ...

    def extract(self, shard: Name, still_mine: Callable[[], None], advance: Callable[[int], None]) -> list[str]:
        """Compute and commit what is missing; what was left out."""
        ...


class Stopped(Exception):  # noqa: N818
    """A signal asked for the end; everything up to here is committed."""


def ignore(*news: object) -> None:
    """For callers who do not want to know."""


def work_through(
    work: Work[Name],
    shards: Sequence[Name] | None = None,
    *,
    timeout: float = TIMEOUT,
    advance: Callable[[int], None] = ignore,
    tell: Callable[[str, str], None] = ignore,
) -> None:
    """Extract shards until all are finished, leaving to others what they hold, and taking over what the dead held.

    `advance` hears how many images have been committed, 0 between shards and while waiting; it may raise `Stopped`.
    `tell` hears the `shard` that is begun, what it `waits` for, and what it `says` was left out.
    """
    leases = Leases(work.store / LEASES, timeout)
    left = list(shards if shards is not None else work.shards)
    first = name_index(f"{platform.node()} {os.getpid()}") % max(len(left), 1)
    left = left[first:] + left[:first]  # so that not everybody knocks at the same door
    while left:
        held = [shard for shard in left if not _settle(work, leases, shard, advance, tell)]
        if len(held) == len(left):
            tell("waits", f"waiting for shard {_name(held[0])}, held by {leases.holder(_name(held[0]))}")
            time.sleep(min(PAUSE, timeout / 4))
        left = held


def _name(shard: ShardName) -> str:
    return f"{shard.split}-{shard.number:05d}"


def _settle(
    work: Work[Name], leases: Leases, shard: Name, advance: Callable[[int], None], tell: Callable[[str, str], None]
) -> bool:
    """Whether a shard is finished, once it was worked on if nobody else does."""
    advance(0)
    if work.is_finished(shard):
        return True
    lease = leases.claim(_name(shard))
    if lease is None:
        return False
    try:
        with lease:
            if not work.is_finished(shard):  # it was, while we claimed
                tell("shard", _name(shard))
                for left_out in work.extract(shard, lease.still_mine, advance):
                    tell("says", left_out)
    except LostLease:
        return False
    return True


class ImageCount:
    """Counts images: a bar with an ETA on a terminal, lines elsewhere, nothing in ranks other than the first."""

    def __init__(self, total: int | None, what: str = "extract") -> None:
        self._bar = ImageBars()
        self._task = self._bar.add_task(what, total=total)
        self._said = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        """So many more are done."""
        if images:  # another thread may be counting
            self._bar.advance(self._task, images)

    def say(self, text: str) -> None:
        """A line that stays, once."""
        if text != self._said:
            self._said = text
            self._bar.console.print(text, soft_wrap=True, highlight=False)

    def tell(self, kind: str, text: str) -> None:
        """A line for what `work_through` tells; a shard that is begun is worth none."""
        if kind != "shard":
            self.say(text)
