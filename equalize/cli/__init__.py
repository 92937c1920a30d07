"""The command line: parse, call one function, print.

    app.py              the commands
    options.py          arguments and flags that commands share
    values.py           how their values are read
    flag_groups.py      flags that go together
    panels.py           help: flags in panels
    examples.py         what stands at its end
    training_options.py those of a training
    loading.py          what is being loaded, said while nothing else is there to see
    terminal.py         stdout, stderr, bars; keeps libraries quiet
    tables.py           tables on a narrow terminal
    next_command.py     the command that goes on from here, with the flags that were given
    training_bars.py    a training as it goes on
    process.py          signals, and readers that go away
    failures.py         from an exception to a sentence and an exit code
    reports/            results as text

A command is one file with one function. Before it runs, only Typer and the standard library are imported: what else it
needs it imports inside.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import typer

from equalize.cli.app import app
from equalize.cli.failures import explain
from equalize.cli.process import flush, interruptible, leave, open_streams, reader_has_gone


def run() -> NoReturn:
    """The `equalize` command as a process."""
    leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; every failure becomes a sentence here.

    Args:
        argv: the arguments; those of the process if None.
    """
    open_streams()
    if "_EQUALIZE_COMPLETE" in os.environ:  # what --install-completion wrote asks; Typer answers and exits
        app(prog_name="equalize")
    arguments = list(sys.argv[1:] if argv is None else argv)
    with interruptible() as signals:
        try:
            return _run(arguments.copy())  # Click uses it up
        except BaseException as error:
            if isinstance(error, BrokenPipeError) and reader_has_gone():  # such as `equalize --help | head -1`
                return 0
            failure = explain(error, signals.received)
            if failure.exit_code == 1 or "--debug" in arguments:
                traceback.print_exc()
            if failure.sentence:
                print(failure.sentence, file=sys.stderr)
            return failure.exit_code


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    exit_code = 0
    try:
        try:
            context = command.make_context("equalize", arguments)
        except SystemExit:  # --install-completion and --show-completion end so, with 0
            raise typer.Exit from None
        with context:
            command.invoke(context)
    except typer.Exit as ending:
        exit_code = ending.exit_code
    flush()
    return exit_code
