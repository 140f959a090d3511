"""Leases: one holder, however two claimers interleave; the dead lose theirs, the living never, late sleepers notice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from samlet.engine import leases
from samlet.engine.leases import RELEASED, Lease, Leases, LostLease
from samlet.errors import SamletError

TIMEOUT = 10.0
HOLDER = """
import sys, time
from pathlib import Path
from samlet.engine.leases import Leases, LostLease
with Leases(Path(sys.argv[1]), float(sys.argv[2])).claim("x") as lease:
    print("held", flush=True)
    while True:
        time.sleep(0.02)
        try:
            lease.still_mine()
        except LostLease as lost:
            print(lost, flush=True)
            break
"""


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        monkeypatch.setattr(leases, "now", lambda: self.time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """No claimer can look up whether a holder's process is there."""
    monkeypatch.setattr(leases, "this_machine", lambda: None)


def claimed(claimer: Leases, name: str = "x") -> Lease:
    lease = claimer.claim(name)
    assert lease is not None
    return lease


def test_one_of_two_gets_it_and_names_are_apart(tmp_path: Path) -> None:
    first, second = Leases(tmp_path), Leases(tmp_path)
    with claimed(first):
        assert second.claim("x") is None
        assert second.holder("x") == f"process {os.getpid()} on {os.uname().nodename}"
        with claimed(second, "x.1"), claimed(second, "y"):
            pass
    with claimed(second) as again:
        again.still_mine()
    assert list(tmp_path.iterdir()) == []


def test_an_error_frees_the_name_at_once(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(Leases(tmp_path)):
        raise ZeroDivisionError
    (left,) = tmp_path.iterdir()
    assert left.read_bytes().startswith(RELEASED)
    with claimed(Leases(tmp_path)) as lease:
        assert lease.path.name == "x.1"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("other_machines")
def test_the_dead_lose_their_lease_after_the_timeout_by_the_claimers_own_clock(tmp_path: Path, clock: Clock) -> None:
    dead, claimer = claimed(Leases(tmp_path, TIMEOUT)), Leases(tmp_path, TIMEOUT)
    clock.time = 1e9  # however long it was dead before anybody looked
    assert claimer.claim("x") is None
    clock.time += TIMEOUT
    assert claimer.claim("x") is None
    assert Leases(tmp_path, TIMEOUT).claim("x") is None
    clock.time += 0.1
    heir = claimed(claimer)
    assert [place.name for place in tmp_path.iterdir()] == [heir.path.name] == ["x.1"]
    heir.still_mine()
    with pytest.raises(LostLease, match=r"x\.0: was held for too long without a beat"):
        dead.still_mine()
    dead.release(finished=True)
    heir.still_mine()


@pytest.mark.usefixtures("other_machines")
def test_the_living_never_lose_it(tmp_path: Path, clock: Clock) -> None:
    alive, claimer = claimed(Leases(tmp_path, TIMEOUT)), Leases(tmp_path, TIMEOUT)
    for _ in range(100):
        clock.time += TIMEOUT / 2
        alive.beat()
        assert claimer.claim("x") is None
        alive.still_mine()


def test_who_beat_late_is_lost_for_ever_even_if_nobody_came(tmp_path: Path, clock: Clock) -> None:
    sleeper = claimed(Leases(tmp_path, TIMEOUT))
    clock.time += TIMEOUT
    sleeper.beat()
    clock.time += 0.1
    sleeper.beat()
    with pytest.raises(LostLease):
        sleeper.still_mine()
    sleeper.release(finished=True)  # it cannot know that it is
    assert claimed(Leases(tmp_path, TIMEOUT)).path.name == "x.1"


def test_a_beat_that_cannot_be_written_is_none(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = claimed(Leases(tmp_path, TIMEOUT))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(3):
        clock.time += TIMEOUT / 3
        lease.beat()
    with pytest.raises(LostLease):
        lease.still_mine()
    with pytest.raises(SamletError, match=r"could not be written there \(No space left on device\); make room"):
        Leases(tmp_path, TIMEOUT).claim("y")


def test_a_claim_cut_short_dies_like_any_other(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "x.4").touch()
    claimer = Leases(tmp_path, TIMEOUT)
    assert claimer.claim("x") is None
    assert claimer.holder("x") == "another process"
    clock.time += TIMEOUT + 1
    assert claimed(claimer).path.name == "x.5"


def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SamletError, match="file: leases could not be written there"):
        Leases(tmp_path / "file")


class Turns:
    """Lets threads run one at a time, and another one at random after a call of the operating system."""

    STEPS = frozenset({"listdir", "open", "read", "pwrite", "fsync", "unlink", "stat"})

    def __init__(self, chance: random.Random, names: list[str]) -> None:
        self.chance, self.waiting, self.turn = chance, names, ""
        self.time, self.pace, self.restless = 0.0, TIMEOUT / chance.choice([10, 40, 160]), chance.choice([1, 0.3, 0.05])
        self._changed = threading.Condition()

    def _next(self) -> None:
        self.time += self.chance.uniform(0, self.pace)
        if self.turn not in self.waiting or self.chance.random() < self.restless:
            self.turn = self.chance.choice(self.waiting) if self.waiting else ""
        self._changed.notify_all()

    def step(self) -> None:
        me = threading.current_thread().name
        with self._changed:
            if me in self.waiting:
                self._next()
                assert self._changed.wait_for(lambda: self.turn == me, timeout=30)

    def leave(self) -> None:
        with self._changed:
            self.waiting.remove(threading.current_thread().name)
            self._next()

    def run(self, life: Callable[[], None]) -> None:
        wrong: list[BaseException] = []

        def live() -> None:
            with self._changed:
                assert self._changed.wait_for(lambda: self.turn == threading.current_thread().name, timeout=30)
            try:
                life()
            except (AssertionError, OSError, ValueError) as error:
                wrong.append(error)
            self.leave()

        threads = [threading.Thread(target=live, name=name) for name in self.waiting]
        for thread in threads:
            thread.start()
        with self._changed:
            self._next()
        for thread in threads:
            thread.join()
        if wrong:
            raise wrong[0]

    def __getattr__(self, name: str) -> Any:
        """The module os, with a change of turns before each call that others could notice."""
        real = getattr(os, name)

        def in_turn(*given: Any) -> Any:
            self.step()
            return real(*given)

        return in_turn if name in self.STEPS else real


class Life:
    """A claimer that holds, beats, oversleeps, lets go or is forgotten, at random, and checks what it is told."""

    def __init__(self, folder: Path, turns: Turns) -> None:
        self.folder, self.turns, self.chance = folder, turns, turns.chance
        self.newest: Lease | None = None  # of both
        self.beaten = 0.0
        self.claims = self.takeovers = self.losses = 0

    def __call__(self) -> None:
        claimer = Leases(self.folder, TIMEOUT)
        for _ in range(25):
            if (lease := claimer.claim("x")) is not None:
                self.note_claim(lease)
                self.hold(lease)

    def note_claim(self, lease: Lease) -> None:
        if self.newest is not None:
            assert self.turns.time - self.beaten > TIMEOUT, "taken from the living"
            self.takeovers += 1
        self.claims, self.newest, self.beaten = self.claims + 1, lease, self.turns.time

    def hold(self, lease: Lease) -> None:
        for _ in range(self.chance.randrange(8)):
            for _ in range(self.chance.choice([0, 0, 3, 30])):
                self.turns.step()
            began = self.turns.time
            lease.beat()
            if self.newest is lease:
                self.beaten = max(self.beaten, began)
            taken = self.newest is not lease
            try:
                lease.still_mine()
                assert not taken, "a lease that was taken over counts as its old holder's"
            except LostLease:
                self.losses += 1
                break
        if self.chance.random() < 0.7:
            if self.newest is lease:
                self.newest = None
            lease.release(finished=False)


@pytest.mark.usefixtures("other_machines")
def test_two_claimers_in_fifty_interleavings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = takeovers = losses = 0
    for seed in range(50):
        turns = Turns(random.Random(seed), ["one", "other"])
        life = Life(tmp_path / str(seed), turns)
        with monkeypatch.context() as patch:
            patch.setattr(leases, "os", turns)
            patch.setattr(leases, "now", lambda turns=turns: turns.time)
            turns.run(life)
        claims, takeovers, losses = claims + life.claims, takeovers + life.takeovers, losses + life.losses
    assert min(claims / 10, takeovers, losses) > 20, (claims, takeovers, losses)


@contextmanager
def holder(folder: Path, timeout: float) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lease on x."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(timeout)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def wait_for_claim(claimer: Leases, seconds: float) -> float:
    """Claim until it works; how long that took."""
    began = time.monotonic()
    while (lease := claimer.claim("x")) is None:
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    lease.release(finished=False)
    return time.monotonic() - began


@pytest.mark.usefixtures("other_machines")
def test_a_killed_holder_is_followed_after_the_timeout_and_a_living_one_is_not(tmp_path: Path) -> None:
    timeout = 1.5
    claimer = Leases(tmp_path, timeout)
    with holder(tmp_path, timeout) as process:
        began = time.monotonic()
        while time.monotonic() - began < 2 * timeout:
            assert claimer.claim("x") is None
            time.sleep(0.02)
        process.kill()
        assert timeout * 0.7 < wait_for_claim(claimer, 3 * timeout)


def test_a_holder_that_died_on_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    with holder(tmp_path, 1000) as process:
        claimer = Leases(tmp_path, 1000)
        assert claimer.claim("x") is None
        process.kill()
        process.wait()
        wait_for_claim(claimer, 5)


def test_a_stopped_holder_is_followed_and_notices_when_it_wakes(tmp_path: Path) -> None:
    with holder(tmp_path, 0.5) as process:
        process.send_signal(signal.SIGSTOP)
        wait_for_claim(Leases(tmp_path, 0.5), 5)
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert "is no longer ours" in process.stdout.readline()
        assert process.wait(5) == 0
    assert (tmp_path / "x.1").read_bytes().startswith(RELEASED)
