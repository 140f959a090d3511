"""Executors: the same store whoever computes it, every image once, the dead replaced, signals and errors told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from samlet.engine import progress, shard_loop, shard_team
from samlet.engine.executors import run_local
from samlet.engine.leases import Leases
from samlet.engine.shard_loop import LEASES, Stopped, work_through
from samlet.errors import SamletError
from tests.engine.drawn_shards import DrawnWork, computed, content, written_job


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that need not import torch anew, which takes longer than all they do."""
    monkeypatch.setattr(shard_team, "CONTEXT", multiprocessing.get_context("fork"))


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, bytes]:
    """What one process makes of twelve images."""
    assert run_local(written_job(tmp_path / "alone"), DrawnWork, images=12) == 0
    return content(tmp_path / "alone")


def started(job: str, processes: int, stderr: Path) -> int:
    """A run in a forked process with a process group of its own."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
        code = run_local(job, DrawnWork, processes, images=12)
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def await_images(store: Path, number: int) -> None:
    limit = time.monotonic() + 120
    while not (store / "computed").is_dir() or len(computed(store)) < number:
        assert time.monotonic() < limit
        time.sleep(0.01)


def await_end_of_group(group: int) -> None:
    limit = time.monotonic() + 120
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < limit
            time.sleep(0.05)


def test_one_process_leaves_a_finished_store_and_nothing_else(alone: dict[str, bytes], tmp_path: Path) -> None:
    assert sorted(alone) == [f"{number:05d}.json" for number in range(4)]
    assert len(computed(tmp_path / "alone")) == 12
    assert list((tmp_path / "alone" / LEASES).iterdir()) == []


@pytest.mark.usefixtures("forked")
def test_a_worker_that_dies_is_replaced_and_the_store_is_the_same(
    alone: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    store = tmp_path / "team"
    assert run_local(written_job(store, die_once="2/1", blank=3), DrawnWork, 2, images=12) == 0
    assert content(store) == alone
    assert computed(store) == computed(tmp_path / "alone")
    told = capfd.readouterr().err
    assert "extract: 12/12 images  eta 0:00" in told
    assert told.count("3 has a blank image") == 1


@pytest.mark.usefixtures("forked")
def test_workers_that_die_again_and_again_end_the_run(tmp_path: Path) -> None:
    job = written_job(tmp_path / "store", shards=2, images=2, die="1/1")
    with pytest.raises(SamletError, match=r"^3 extracting processes died at shard train-00001 .*SIGKILL.*is kept$"):
        run_local(job, DrawnWork, 2, images=4)
    assert computed(tmp_path / "store") == ["0-0", "0-1", "1-0"]


@pytest.mark.usefixtures("forked")
def test_what_a_worker_cannot_read_ends_the_run_with_its_sentence(tmp_path: Path) -> None:
    for processes in (1, 2):
        job = written_job(tmp_path / str(processes), error="1/1")
        with pytest.raises(SamletError, match=r"^1/1\.jpg: cannot be read; mend or remove it$"):
            run_local(job, DrawnWork, processes, images=12)


@pytest.mark.parametrize(
    ("number", "start"),
    [
        (signal.SIGTERM, None),
        (signal.SIGINT, "fork"),
        pytest.param(signal.SIGINT, "spawn", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_all_ends_all_and_a_later_start_completes(
    number: signal.Signals,
    start: str | None,
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_team, "CONTEXT", multiprocessing.get_context(start))
    store, said = tmp_path / "store", tmp_path / "stderr"
    run = started(written_job(store, seconds=0.5), 2 if start else 1, said)
    await_images(store, 1)
    os.killpg(run, number)
    assert exit_code(run) == 128 + number
    assert "stopping" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert 1 <= len(computed(store)) < 12
    before = computed(store)
    assert run_local(written_job(store), DrawnWork, images=12 - len(before)) == 0
    assert content(store) == alone
    assert computed(store) == computed(tmp_path / "alone")  # nothing twice


def test_workers_end_when_whoever_started_them_is_killed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run = started(written_job(store, seconds=0.5), 2, tmp_path / "stderr")
    await_images(store, 1)
    os.kill(run, signal.SIGKILL)
    assert exit_code(run) == -signal.SIGKILL
    await_end_of_group(run)
    assert len(computed(store)) < 12


def test_launched_twice_on_one_folder_every_image_is_computed_once(alone: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "store"
    runs = [started(written_job(store, seconds=0.05), 1, tmp_path / "stderr") for _ in range(2)]
    assert [exit_code(run) for run in runs] == [0, 0]
    assert content(store) == alone
    assert computed(store) == computed(tmp_path / "alone")


def test_a_shard_that_another_holds_is_waited_for_and_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samlet.engine.leases.this_machine", lambda: None)
    work, said = DrawnWork(written_job(tmp_path, shards=3, images=1)), list[str]()
    assert Leases(tmp_path / LEASES).claim("train-00001") is not None  # and dies
    work_through(work, timeout=0.5, tell=lambda kind, text: said.append(text) if kind == "waits" else None)
    assert set(said) == {f"waiting for shard train-00001, held by process {os.getpid()} on {os.uname().nodename}"}
    assert computed(tmp_path) == ["0-0", "1-0", "2-0"]


def test_while_it_waits_it_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_loop, "PAUSE", 0.01)
    calls = list[int]()

    def advance(images: int) -> None:
        calls.append(images)
        if len(calls) == 5:
            raise Stopped

    assert Leases(tmp_path / LEASES).claim("train-00000") is not None
    with pytest.raises(Stopped):
        work_through(DrawnWork(written_job(tmp_path, shards=1)), advance=advance)


def test_who_overslept_commits_nothing_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heart stands still, too: one that beats would keep the lease, as it should."""
    monkeypatch.setattr("samlet.engine.leases.Lease.beat", lambda lease: None)
    sleeper = DrawnWork(written_job(tmp_path, shards=2, images=2, sleep_once="1/1", asleep=1.5))
    other = DrawnWork(written_job(tmp_path, shards=2, images=2))
    late = threading.Timer(0.3, lambda: work_through(other, timeout=0.5))
    late.start()
    work_through(sleeper, timeout=0.5)
    late.join()
    assert all(work.is_finished(shard) for work in (sleeper, other) for shard in work.shards)
    assert [line.count("features") for line in map(bytes.decode, content(tmp_path).values())] == [2, 2]
