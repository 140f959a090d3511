"""Who works at what: one process at a time holds a name, over all machines that see a folder, and no dead one keeps it.

`<name>.<generation>` is a claim, created exclusively, so that one of many claimers makes it; the newest generation is
the lease. Its file is a beat, which the holder overwrites in place, and who the holder is. A claimer that has seen the
same bytes for a whole time-out, by its own clock, makes the next generation. The newest one is never renamed, nor
removed while there is work left under the name, so whoever fell asleep in the middle of a claim finds it. A holder that
could not beat for most of a time-out, because it was stopped or its disk was gone, takes itself for robbed whether it
was or not: no clock of another machine is ever read. To create exclusively, and to read what was flushed elsewhere, is
all that a folder must do right; NFS does.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from samlet.errors import SamletError

TIMEOUT = 120.0  # seconds without a beat after which a lease is dead
BEATS = 6  # in a time-out
TRUST = 0.75  # share of a time-out for which a holder believes in its last beat
BEAT = 20  # bytes of the beat; the holder's description follows
RELEASED = b"released".ljust(BEAT)


class LostLease(Exception):  # noqa: N818
    """The name may be somebody else's by now: what was computed under it must not be committed."""


def now() -> float:
    """Seconds that pass while a machine sleeps, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def this_machine() -> str | None:
    """The running system and its table of processes, so that a pid found in a lease can be looked up; if it can be."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"  # copies of a machine share the boot
    except OSError:
        return None


class Lease:
    """A name that is ours; as a context it beats, and goes free when left by an exception, away when left without."""

    def __init__(self, path: Path, descriptor: int, timeout: float) -> None:
        self.path, self.timeout = path, timeout
        self._descriptor = descriptor
        self._beats, self._beaten, self._lost = 0, now(), False
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name=f"lease on {path.name}", daemon=True)
        owner = {"host": platform.node(), "machine": this_machine(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._write(b"0".zfill(BEAT) + json.dumps(owner).encode())

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        self.release(finished=error is None)

    def _write(self, content: bytes) -> None:
        os.pwrite(self._descriptor, content, 0)  # into our own claim, whatever has come after it
        os.fsync(self._descriptor)

    def _beat_on(self) -> None:
        while not self._stop.wait(self.timeout / BEATS):
            self.beat()

    def beat(self) -> None:
        """Show that the holder lives; once late is late for ever."""
        began = now()
        try:
            self._write(str(self._beats + 1).encode().zfill(BEAT))
        except OSError:  # a full disk or a server that is away: time tells
            return
        if now() - self._beaten > TRUST * self.timeout:
            self._lost = True
        self._beats, self._beaten = self._beats + 1, began

    def still_mine(self) -> None:
        """Ask before each commit.

        Raises:
            LostLease: the lease was taken over, or could have been.
        """
        late = self._lost or now() - self._beaten > TRUST * self.timeout
        if late or not _exists(self.path) or _exists(_following(self.path)):
            self._lost = True
            raise LostLease(f"{self.path}: was held for too long without a beat, and is no longer ours")

    def release(self, *, finished: bool) -> None:
        """Let go: of a name whose work is finished no trace stays; any other is free at once."""
        with suppress(OSError):  # a folder that is gone holds nobody up
            if finished and not self._lost:
                os.unlink(self.path)
            else:
                self._write(RELEASED)
        os.close(self._descriptor)


class Leases:
    """The leases in one folder, as one claimer sees them."""

    def __init__(self, folder: Path, timeout: float = TIMEOUT) -> None:
        self.folder, self.timeout = folder, timeout
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._machine = this_machine()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def claim(self, name: str) -> Lease | None:
        """The lease on a name, unless somebody has it and lives.

        Raises:
            SamletError: the folder cannot be written.
        """
        claims = self._claims(name)
        newest = claims[-1] if claims else -1
        if claims and not self._is_free(self.folder / f"{name}.{newest}"):
            return None
        place = self.folder / f"{name}.{newest + 1}"
        try:
            descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            lease = Lease(place, descriptor, self.timeout)
        except FileExistsError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        claims = self._claims(name)
        if claims[-1:] != [newest + 1]:  # we slept since we looked, and others went on
            lease.release(finished=True)
            return None
        for older in claims[:-1]:
            with suppress(FileNotFoundError):
                os.unlink(self.folder / f"{name}.{older}")
        return lease

    def holder(self, name: str) -> str:
        """Who has a name, for people."""
        claims = self._claims(name)
        owner = _owner(_content(self.folder / f"{name}.{claims[-1]}")) if claims else {}
        return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"

    def _claims(self, name: str) -> list[int]:
        """Generations of a name, oldest first."""
        parts = [entry.rpartition(".") for entry in os.listdir(self.folder)]
        return sorted(int(end) for start, _, end in parts if start == name and end.isdecimal())

    def _is_free(self, place: Path) -> bool:
        content = _content(place)
        if content is None:  # it has gone since we looked: finished, or superseded
            return False
        if content.startswith(RELEASED) or self._died_here(_owner(content)):
            return True
        seen, since = self._seen.get(place.name, (None, 0.0))
        if seen != content:
            self._seen[place.name] = content, now()
            return False
        return now() - since > self.timeout

    def _died_here(self, owner: dict[str, object]) -> bool:
        """Whether the holder was a process of this very system, and is none now."""
        pid = owner.get("pid")
        if self._machine is None or owner.get("machine") != self._machine or not isinstance(pid, int):
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def _unusable(self, error: OSError) -> SamletError:
        return SamletError(
            f"{self.folder}: leases could not be written there ({error.strerror or error}); "
            "make room or mend the permissions, then run the same command again"
        )


def _following(place: Path) -> Path:
    name, _, generation = place.name.rpartition(".")
    return place.with_name(f"{name}.{int(generation) + 1}")


def _exists(place: Path) -> bool:
    try:
        os.stat(place)
    except FileNotFoundError:
        return False
    return True


def _content(place: Path) -> bytes | None:
    """What a claim says now: opening a file makes NFS ask the server."""
    try:
        descriptor = os.open(place, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def _owner(content: bytes | None) -> dict[str, object]:
    """Who a claim names; nobody while it is being written."""
    try:
        owner = json.loads(content[BEAT:]) if content else {}
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
