"""Starts several processes of the command line as a launcher does, forked from one that has imported it. No tests.

Run as a script it reads requests from stdin, a JSON object a line, and answers each with a line.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """One process: its exit code, negative for a signal, what it printed, and when it ended, in seconds."""

    code: int
    out: str
    err: str
    seconds: float


ROOT = Path(__file__).parents[2]


class Launcher:
    """Keeps the process from which the others are forked; close it in the end."""

    def __init__(self) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line sets it before torch is imported
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.launcher"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, number: int, *arguments: object, **settings: object) -> list[Ended]:
        """The command line in `number` processes, in the order of their ranks.

        Args:
            number: of processes; 1 runs without any of a launcher's variables.
            arguments: of the command line.
            settings: `kill`: (rank, signal) sent once the file `marker` exists, to all where the rank is -1.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"number": number, "arguments": [str(each) for each in arguments], **settings}
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return [Ended(**each) for each in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    import torch

    import equalize.cli.reports.plan
    import equalize.cli.terminal
    import equalize.commands.calibrate
    from tests.support.networks import Fusion

    equalize.scan(Fusion(torch.nn.Conv2d(6, 2, 1)), torch.randn(2, 3, 8, 8))  # imports what tracing needs
    for line in sys.stdin:
        print(json.dumps(_launch(**json.loads(line))), flush=True)


def _launch(number, arguments, kill=None, marker=None):
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        start = time.monotonic()
        children = {_fork(rank, number, port, arguments, Path(folder)): rank for rank in range(number)}
        if kill is not None:
            while not Path(marker).exists() and time.monotonic() < start + 60:
                time.sleep(0.02)
            for child, rank in children.items():
                if kill[0] in (rank, -1):
                    os.kill(child, kill[1])
            start = time.monotonic()
        ended = {}
        while children:
            child, status = os.wait()
            rank = children.pop(child)
            out, err = (Path(folder, f"{rank}.{stream}").read_text() for stream in ("out", "err"))
            code = os.waitstatus_to_exitcode(status)
            ended[rank] = {"code": code, "out": out, "err": err, "seconds": time.monotonic() - start}
        return [ended[rank] for rank in range(number)]


def _fork(rank, number, port, arguments, folder):
    child = os.fork()
    if child:
        return child
    for stream, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT), descriptor)
    if number > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    from equalize.cli import main

    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve()
