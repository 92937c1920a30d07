"""The process around a command: signals that end it, and readers that go away."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import IO

__all__ = ["Signals", "Terminated", "discard", "flush", "interruptible", "open_streams", "reader_has_gone"]


class Terminated(BaseException):
    """SIGTERM arrived."""


class Signals:
    """Which signal has asked the process to end, if any."""

    received: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Ends what is running as Ctrl-C does: by an exception, so that every `finally` is carried out."""
        self.received = number
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated


@contextlib.contextmanager
def interruptible() -> Iterator[Signals]:
    """SIGINT and SIGTERM become exceptions and are remembered, in case a library swallows or disguises one."""
    signals = Signals()
    before = {number: signal.signal(number, signals.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_streams() -> None:
    """Gives a process that was started without stdout or stderr (`>&-`) ones that lead nowhere."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def flush() -> None:
    """Empties stdout, so that a full disk behind it is noticed here and not at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)


def reader_has_gone() -> bool:
    """Whether it was stdout's pipe that broke, and not another: one more line tells, buffered or not."""
    try:
        print(flush=True)
    except BrokenPipeError:
        discard(sys.stdout)
        return True
    return False


def discard(stream: IO[str]) -> None:
    """Points a stream whose reader has gone at the null device: else Python complains when it exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
