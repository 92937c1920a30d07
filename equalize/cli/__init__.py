"""The command line: parse, call one function, print.

    app.py        the commands, one registration line each
    options.py    arguments and flags that commands share
    terminal.py   stdout, stderr, bars; keeps libraries quiet
    process.py    signals, and readers that go away
    failures.py   from an exception to a sentence and an exit code

A command is one file with one function. Before it runs, only Typer and the standard library are imported: what else it
needs it imports inside.
"""

import sys
import traceback
from collections.abc import Sequence

import typer

from equalize.cli.app import app
from equalize.cli.failures import explain
from equalize.cli.process import flush, interruptible

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; every failure becomes a sentence here.

    Args:
        argv: the arguments; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(app)
    debug = False
    with interruptible() as signals:
        try:
            with command.make_context("equalize", arguments) as context:
                debug = bool(context.params.get("debug"))
                command.invoke(context)
            flush()
        except typer.Exit as ending:
            flush()
            return ending.exit_code
        except BaseException as error:
            failure = explain(error, signals.received)
            if debug or failure.is_bug:
                traceback.print_exc()
            print(failure.sentence, file=sys.stderr)
            return failure.exit_code
    return 0
