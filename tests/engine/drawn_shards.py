"""Shards of small products of matrices, extracted as real ones are, with mishaps; worker processes import them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from samlet.errors import DataError


class DrawnShard(NamedTuple):
    split: str
    number: int


class DrawnWork:
    """`job` is JSON: store, shards and images of each; seconds an image; what happens at which image.

    `die`: the process is killed, every time; `die_once`: the first time; `sleep_once`: it sleeps as long.
    `error`: what a broken file would be; `blank`: the shard that leaves something out.
    """

    def __init__(self, job: str) -> None:
        self.job: dict[str, Any] = json.loads(job)
        self.store = Path(self.job["store"])
        self.shards = tuple(DrawnShard("train", number) for number in range(self.job["shards"]))
        (self.store / "computed").mkdir(parents=True, exist_ok=True)

    def place(self, shard: DrawnShard) -> Path:
        return self.store / f"{shard.number:05d}.json"

    def is_finished(self, shard: DrawnShard) -> bool:
        return self.place(shard).exists()

    def extract(self, shard: DrawnShard, still_mine: Callable[[], None], advance: Callable[[int], None]) -> list[str]:
        journal = self.place(shard).with_suffix(".jsonl")
        done = len(journal.read_text().splitlines()) if journal.exists() else 0
        for number in range(done, self.job["images"]):
            image = f"{shard.number}/{number}"
            self.mishap(image)
            time.sleep(self.job.get("seconds", 0))
            line = json.dumps({"image": image, "features": self.features(shard, number)})
            still_mine()
            with journal.open("a") as file:
                file.write(line + "\n")
            (self.store / "computed" / f"{image.replace('/', '-')}.{os.getpid()}").touch()
            advance(1)
        still_mine()
        os.replace(journal, self.place(shard))
        return [f"{shard.number} has a blank image"] if shard.number == self.job.get("blank") else []

    def mishap(self, image: str) -> None:
        if image == self.job.get("error"):
            raise DataError(f"{image}.jpg: cannot be read; mend or remove it")
        if image == self.job.get("die") or (image == self.job.get("die_once") and self.first(image)):
            os.kill(os.getpid(), signal.SIGKILL)
        if image == self.job.get("sleep_once") and self.first(image):
            time.sleep(self.job["asleep"])

    def first(self, image: str) -> bool:
        """Whether nothing has happened at this image yet, in no process."""
        mark = self.store / f"mishap-{image.replace('/', '-')}"
        there = mark.exists()
        mark.touch()
        return not there

    @staticmethod
    def features(shard: DrawnShard, number: int) -> list[float]:
        drawn = torch.randn(2, 96, 96, generator=torch.Generator().manual_seed(shard.number * 1000 + number))
        values: list[float] = torch.softmax(drawn[0] @ drawn[1], dim=-1).sum(0)[:8].tolist()
        return values


def written_job(store: Path, shards: int = 4, images: int = 3, **mishaps: Any) -> str:
    return json.dumps({"store": str(store), "shards": shards, "images": images, **mishaps})


def content(store: Path) -> dict[str, bytes]:
    """Everything that is finished, and what should not be there."""
    return {place.name: place.read_bytes() for place in store.iterdir() if place.is_file() and place.suffix}


def computed(store: Path) -> list[str]:
    """Images, as often as they were committed."""
    return sorted(place.stem for place in (store / "computed").iterdir())
