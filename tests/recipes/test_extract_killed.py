"""An extraction that is killed or stopped goes on to the bytes of one that never was."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from samlet.distill.store import Entry, Shard, StoreReader
from samlet.distill.store.checking import check
from tests.recipes.test_extract import samlet_extract, stored, written_config
from tests.tiny import write_scenes, write_teacher

SPLITS = ("train", "val")


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which only a power cut would notice


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    return write_scenes(folder / "scenes", train=7, val=3), write_teacher(folder / "teacher.pth")


def in_a_child(config: Path, prepare: Callable[[], object]) -> int:
    """The exit code of an extraction in a forked process."""
    child = os.fork()
    if not child:
        code = 99
        try:
            torch.set_num_threads(1)  # OpenMP's threads survive no fork
            prepare()
            code = samlet_extract(config)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(store: Path, moment: int, counted: Path | None = None) -> None:
    """Die at the so many-th time that a file of the store is opened, renamed, removed or listed."""
    passed = 0

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal passed
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(store) in str(arguments[0]):
            passed += 1
            if counted is not None:
                os.truncate(counted, passed)
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def readable_entries(store: Path) -> int:
    """How many image-variants are committed; every byte of them is looked at."""
    if not (store / "manifest.json").exists():
        return 0
    readers = [StoreReader(store, split) for split in SPLITS]
    for reader in readers:
        for image_id, variant in reader.entries:
            reader.read(image_id, variant, ("embedding", "blocks.0@neck"))
    return sum(len(reader.entries) for reader in readers)


@pytest.mark.parametrize("pack", [False, True])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(made: tuple[Path, Path], tmp_path: Path, pack: bool) -> None:
    def of(name: str) -> Path:
        return written_config(*made, tmp_path / name, tmp_path / f"{name}.json", extraction={"pack": pack})

    counted = tmp_path / "counted"
    counted.touch()
    assert in_a_child(of("calm"), lambda: kill_at(tmp_path / "calm/T", 0, counted)) == 0
    moments, total, hits = random.Random(0), counted.stat().st_size, 0
    for number in range(2):
        config, store = of(f"storm{number}"), tmp_path / f"storm{number}" / "T"
        before = 0
        for _ in range(3):
            moment = moments.randrange(1, total // 3)
            code = in_a_child(config, partial(kill_at, store, moment))
            assert code in (-signal.SIGKILL, 0), code
            hits += code != 0
            after = readable_entries(store)
            assert after >= before
            before = after
        assert in_a_child(config, lambda: None) == 0
        assert check(store).sound
        assert stored(store) == stored(tmp_path / "calm/T")
    assert hits >= 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_the_image_and_the_next_start_completes(
    made: tuple[Path, Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    config, store = written_config(*made, tmp_path / "stores", tmp_path / "c.json"), tmp_path / "stores" / "T"
    real, times = Shard.add_stored, iter(range(99))

    def add_stored(shard: Shard, entry: Entry, arrays: Mapping[str, np.ndarray]) -> None:
        if next(times) == 1:
            os.kill(os.getpid(), number)
        real(shard, entry, arrays)

    assert in_a_child(config, lambda: setattr(Shard, "add_stored", add_stored)) == code
    assert 2 <= readable_entries(store) <= 4  # the network may have been at work on the next one
    assert in_a_child(config, lambda: None) == 0
    assert check(store).sound
    assert readable_entries(store) == 10
    assert os.listdir(store / ".leases") == []
