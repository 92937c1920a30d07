import errno
import io

import pytest
import torch
import typer
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from equalize.cli.failures import explain
from equalize.cli.process import Terminated, interruptible
from equalize.cli.terminal import _console
from equalize.errors import InputError, NumericsError, ResourceError

CASES = [
    (InputError("--x", "is bad", remedy="use\nanother"), 2, "error: --x: is bad; use another"),
    (ResourceError("disk", "is gone"), 3, "error: disk: is gone"),
    (NumericsError("layer", "is NaN"), 4, "error: layer: is NaN"),
    (MemoryError(), 3, "error: memory: there is not enough of it"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), 3, "error: --device: its memory is full"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "error: memory: "),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), 3, "error: a/b: the disk is full"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), 3, "error: a: permission denied"),
    (OSError(errno.EIO, "Input/output error"), 3, "error: system: Input/output error"),
    (SafetensorError("Error while serializing\nmore"), 3, "error: safetensors: a file cannot be read or written"),
    (typer.BadParameter("is bad", param_hint="--y"), 2, "error: --y: is bad; see equalize --help"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("error", "code", "begins"), CASES, ids=lambda value: type(value).__name__)
def test_every_known_failure_has_a_line_and_a_code(error, code, begins):
    failure = explain(error)
    assert failure.sentence.startswith(begins)
    assert "\n" not in failure.sentence
    assert failure.exit_code == code


def test_a_terminal_is_sent_nothing_to_obey():
    """Names of keys, layers and classes come from untrusted files."""
    named = "road\x1b[31m\x9b2J\u202eevil"
    shown = "road\ufffd[31m\ufffd2J\ufffdevil"
    assert explain(InputError(named, "is bad")).sentence == f"error: {shown}: is bad"
    written = io.StringIO()
    table = Table("name")
    table.add_row(named)
    _console(written).print(table, Text(named), sep="\n")
    assert written.getvalue().count("road\ufffd[31m\ufffd2J\ufffd") == 2
    assert "\x1b" not in written.getvalue()


def test_the_hub_and_the_network_are_resources():
    from huggingface_hub.errors import OfflineModeIsEnabled

    unreachable = type("ConnectError", (type("HTTPError", (Exception,), {"__module__": "httpx"}),), {})
    for error in (unreachable("no route"), OfflineModeIsEnabled("offline")):
        failure = explain(error)
        assert failure.exit_code == 3
        assert failure.sentence.startswith("error: network: ")


def test_a_bug_shows_its_traceback(run_cli, monkeypatch):
    import equalize.commands.scan

    def broken(*arguments, **options):
        raise AssertionError("an invariant")

    monkeypatch.setattr(equalize.commands.scan, "scan_checkpoint", broken)
    ran = run_cli("scan", "anything", "--json")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Traceback")
    assert "AssertionError: an invariant" in ran.err
    assert "please report" in ran.err.splitlines()[-1]


def test_a_signal_explains_whatever_came_of_it():
    assert explain(RuntimeError("a library disguised it"), 15).exit_code == 143
    assert explain(Terminated(), 15).sentence == "interrupted"


def test_signal_handlers_are_given_back():
    import signal

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interruptible() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Full(io.StringIO):
    """A file on a disk that is full."""

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_behind_stdout_is_noticed(monkeypatch, capsys):
    import sys

    from equalize.cli import main

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["--version"]) == 3
    assert capsys.readouterr().err == "error: system: the disk is full; make room and try again\n"


def test_where_json_cannot_be_written_that_stands_alone(monkeypatch, capsys):
    import sys

    from equalize.cli.app import app
    from equalize.cli.terminal import open_terminal

    monkeypatch.setattr(sys, "stdout", Full())
    with open_terminal(typer.Context(typer.main.get_command(app)), as_json=True) as terminal:
        terminal.note("a fact")
        with pytest.raises(OSError, match="No space left"):
            terminal.result({"a": 1})
    assert capsys.readouterr().err == ""
