"""The command line in processes of its own: their exit codes, streams and signals. No tests.

They are forked from a server that has imported everything, so that a start takes milliseconds. What only a real start
shows (imports, closed streams) is in tests/cli/test_process.py.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.side_by_side import ranks, start


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One process: its exit code, negative for a signal, what it printed, and the seconds until it had ended."""

    code: int
    out: str
    err: str
    seconds: float


class Command:
    """A command that runs beside the test.

    Args:
        arguments: of the command line.
        prepare: a module's function that the process calls first.
        env: further variables of its environment.
    """

    def __init__(
        self,
        *arguments: object,
        prepare: Callable[[], None] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._begun = time.monotonic()
        words = [str(each) for each in arguments]
        settings = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **(env or {})}
        self.process = start(_run, Path(self._folder.name), words, prepare, env=settings, daemon=False)

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self) -> Ended:
        """Waits until it has ended."""
        self.process.join(timeout=120)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        seconds = time.monotonic() - self._begun
        out, err = (Path(self._folder.name, stream).read_text() for stream in ("out", "err"))
        self._folder.cleanup()
        assert self.process.exitcode is not None
        return Ended(code=self.process.exitcode, out=out, err=err, seconds=seconds)


def run_together(
    number: int, *arguments: object, kill: tuple[int, int] | None = None, marker: Path | None = None
) -> list[Ended]:
    """The command line in `number` processes, as a launcher starts them; how each ended, by rank.

    Args:
        number: of processes; 1 runs without any of a launcher's variables.
        arguments: of the command line.
        kill: (rank, signal), sent once the file `marker` exists; to all where the rank is -1.
        marker: a file that one of them writes.
    """
    commands = [Command(*arguments, env=each) for each in (ranks(number) if number > 1 else [{}])]
    if kill is not None:
        assert marker is not None
        while not marker.exists() and all(command.is_running() for command in commands):
            time.sleep(0.02)
        for rank, command in enumerate(commands):
            if kill[0] in (rank, -1):
                command.send_signal(kill[1])
    return [command.finish() for command in commands]


def _run(folder: Path, arguments: list[str], prepare: Callable[[], None] | None) -> None:
    for stream, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT), descriptor)
    if prepare is not None:
        prepare()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # the server's may lead elsewhere, and seek
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    from equalize.cli import main

    raise SystemExit(main(arguments))
