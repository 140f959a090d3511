"""SIGTERM and Ctrl-C end the current optimizer step, not the process; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """The signal that asked the run to stop, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; on a second SIGINT leave without touching a file."""
        if self.signal == signal.SIGINT == number:
            os._exit(128 + signal.SIGINT)
        self.signal = number
        again = "; Ctrl-C again leaves at once, without saving" if number == signal.SIGINT else ""
        os.write(2, f"\nstopping after this step of work{again}\n".encode())

    def leave_if_asked(self) -> None:
        """End the program between two pieces of work, of which each is kept.

        Raises:
            SystemExit: a signal came; with its exit code.
        """
        if self.signal is not None:
            os.write(2, b"stopped; the same command goes on from here\n")
            raise SystemExit(self.exit_code)

    @property
    def exit_code(self) -> int:
        """143 for SIGTERM, 130 for SIGINT, 0 for none."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT inside the block; the former handlers come back after it.

    Only the main thread can: in others nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def leave_signals_to_the_run(worker: int) -> None:
    """A signal to the whole process group must not end the workers before the run has saved; they end with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
