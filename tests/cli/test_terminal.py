"""What a terminal shows: bars that leave lines alone, and tables that fit."""

import contextlib
import functools
import io
import os
import pty
import select
import sys

import pytest
from rich.console import Console
from rich.table import Table

from equalize.cli.tables import fitted
from equalize.cli.terminal import Terminal
from equalize.cli.training_bars import training_bars
from tests.support.commands import Command
from tests.support.scenes import write_scenes
from tests.support.screens import Tty, shown


@pytest.fixture(params=[80, 100, 120])
def columns(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("TERM", "xterm")
    return request.param


def test_lines_stand_above_the_bars(columns, monkeypatch):
    """stdout and stderr are one terminal, on which other libraries print as well."""
    tty = Tty()
    monkeypatch.setattr(sys, "stdout", tty)
    monkeypatch.setattr(sys, "stderr", tty)
    terminal = Terminal(as_json=False)
    path = f"/{'long' * 40}/name"  # wider than any of the terminals, which wrap it
    terminal.note("data: 4 pairs")
    with training_bars(terminal, "OUT") as bars:
        bars.working("measuring", 1, 4)
        bars.working("measuring", 4, 4)
        bars.stepped(0, 20)
        bars.logged(10, 20, loss=1.23456, lr=7e-4)
        terminal.note("at step 10")  # the bars are drawn again
        bars.working("scoring", 1, 3)
        (steps,) = [line for line in shown(tty.getvalue(), columns) if line.startswith("step 10/20")]
        assert "loss 1.23  lr 7.0e-04" in steps
        assert shown(tty.getvalue(), columns)[-1].startswith("scoring 1/3")
        bars.working("scoring", 3, 3)
        bars.scored(10, 20, miou=14.25, best_before=None)
        terminal.note("none_lr0.01_seed0: mIoU 14.25 after 20 steps, 3 s")
        terminal.note(path)
        bars.scored(20, 20, miou=13.0, best_before=14.25)
        last = shown(tty.getvalue(), columns)[-1]
        assert last.startswith("step 20/20")
        assert "mIoU 13.0" in last
    wrapped = [path[start : start + columns] for start in range(0, len(path), columns)]
    assert shown(tty.getvalue(), columns) == [
        "data: 4 pairs",
        "at step 10",
        "val mIoU 14.2 (best) at step 10/20",
        "none_lr0.01_seed0: mIoU 14.25 after 20 steps, 3 s",
        *wrapped,
        "val mIoU 13.0 (best 14.2) at step 20/20",
    ]


def test_tables_are_split_between_columns(columns):
    headings = ["arm", "lr", *(f"heading {number}" for number in range(10))]
    rows = [[arm, lr, *(f"{arm}{lr} {n}.25 ± 0.5" for n in range(10))] for arm in ("a", "b") for lr in ("1", "2")]
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2))
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=columns)
    parts = fitted(table, console)
    assert all([column.header for column in part.columns][:2] == ["arm", "lr"] for part in parts)  # tell rows apart
    assert [column.header for part in parts for column in part.columns[2:]] == headings[2:]
    for part in parts:
        console.print(part)
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= columns
    assert all(cell in printed for row in rows for cell in row)
    wide = Console(file=io.StringIO(), width=400)
    assert fitted(table, wide) == [table]


def onto(terminal: str) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(terminal, os.O_WRONLY | os.O_NOCTTY), descriptor)


def test_a_training_on_a_terminal_of_80_columns(segformer_dir, tmp_path):
    data = write_scenes(tmp_path / "d", 5, counts={"train": 4, "val": 2})
    master, slave = pty.openpty()
    command = Command(
        *("finetune", segformer_dir, "--data", data, "-o", tmp_path / "out", "--batch-size", 2, "--max-steps", 4),
        *("--device", "cpu", "--log-every", 1),
        prepare=functools.partial(onto, os.ttyname(slave)),
        env={"COLUMNS": "80", "TERM": "xterm"},
    )
    received = b""
    while command.is_running():
        if select.select([master], [], [], 0.1)[0]:
            received += os.read(master, 65536)
    os.close(slave)
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while block := os.read(master, 65536):
            received += block
    os.close(master)
    assert command.finish().code == 0
    text = received.decode()
    assert "step 4/4" in text
    assert "scoring" in text
    screen = shown(text, 80)
    assert not any("━" in line for line in screen)
    assert sum(line.startswith("val mIoU ") for line in screen) == 2
    heading = next(number for number, line in enumerate(screen) if line.split()[:2] == ["class", "name"])
    assert [line.split()[1] for line in screen[heading + 1 : heading + 6]] == [f"LABEL_{label}" for label in range(5)]
