"""Signals that end a command, and pipes whose reader has closed."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import IO, NoReturn

from equalize.errors import InputError


class Terminated(BaseException):
    """SIGTERM arrived."""


class Signals:
    """The signal that was received, if any."""

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


def demand_one_process(what: str, remedy: str) -> None:
    """Refuses a command under `torchrun` that several processes cannot share so."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError("torchrun", what, remedy=remedy)


def open_streams() -> None:
    """Replaces a missing stdout or stderr (`>&-`) by the null device."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def flush() -> None:
    """Flushes stdout, so that a full disk is noticed here and not at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)


def reader_has_gone() -> bool:
    """Whether stdout's pipe is the broken one: writes one more line to find out."""
    try:
        print(flush=True)
    except BrokenPipeError:
        discard(sys.stdout)
        return True
    return False


def discard(stream: IO[str]) -> None:
    """Redirects a stream whose reader has closed to the null device: else Python reports an error at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def leave(exit_code: int) -> NoReturn:
    """Ends the process, by its exit handlers alone where nobody else is in it.

    Python would take apart all that torch and transformers have made, object by object, which takes a second.
    """
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    if "torch" in sys.modules and len(threads) == 1 and "WORLD_SIZE" not in os.environ:
        from multiprocessing import active_children

        if not active_children():
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(exit_code)
    sys.exit(exit_code)
