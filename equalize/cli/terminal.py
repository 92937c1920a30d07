"""A command's output: results on stdout, everything else on stderr.

    stdout   the result: a report, or with --json one JSON object and nothing else
    stderr   bars (on a terminal only), warnings, errors; with --json also the notes

While a command runs, `sys.stdout` is stderr, so that nothing a library or a user's own code prints gets into the
result; and what libraries log and warn about is dropped unless --debug asks for it. Commands import this file when
they run: Rich is not needed for help.
"""

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from equalize.cli.failures import explain, visible
from equalize.cli.loading import Loading
from equalize.cli.process import discard
from equalize.cli.tables import WIDEST, fitted, width


class _Console(Console):
    """A console whose reader may close the pipe (`equalize scan ... | head`); the command then finishes without output.

    Names of layers and classes come from untrusted files: terminal controls are not sent.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        discard(self.file)
        self.quiet = True


class _Bars(Progress):
    """Bars that something must make room for."""

    before: Callable[[], None]

    def start(self) -> None:
        self.before()
        super().start()


class Terminal:
    """Prints a command's result, notes, warnings and progress."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self._stdout = sys.stdout
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)
        self._held: list[tuple[Console, Text]] = []
        self._has_bars = False
        self.loading = Loading(sys.stderr, shown=self._err.is_terminal and not as_json)

    @contextlib.contextmanager
    def among_peers(self) -> Iterator[None]:
        """Joins the group of processes that a launcher started, if any; only the main one prints."""
        from equalize.distributed import is_main, joined

        with joined(lambda error: explain(error).exit_code):
            if not is_main():
                self.loading.stop()
                self._out = self._err = _console(io.StringIO())
            yield

    @property
    def notes_are_seen(self) -> bool:
        """Whether notes go to a terminal that can have bars."""
        return self._notes.is_terminal and self._err.is_terminal

    @property
    def _notes(self) -> Console:
        return self._err if self._json else self._out

    def note(self, line: str) -> None:
        """Prints an information: at once on a terminal, else with the result, so that an error is the only line."""
        self._say(self._notes, Text(line))

    def report(self, line: str) -> None:
        """Prints what has just happened where notes go, at once, behind the notes that were held back."""
        self._release()
        self._print(self._notes, Text(line, no_wrap=True))

    def warn(self, line: str) -> None:
        """Prints a warning."""
        self._say(self._err, Text(f"warning: {line}"))

    def _say(self, console: Console, text: Text) -> None:
        self._held.append((console, text))
        if self._err.is_terminal:
            self._release()

    def _release(self) -> None:
        while self._held:
            self._print(*self._held.pop(0))

    def hint(self, *lines: str | None, always: bool = False) -> None:
        """Prints suggestions; with --json only if `always`. Only the main process prints."""
        for line in lines:
            if line and _is_main() and (always or not self._json):
                self._print(self._err, Text(line, style="dim", no_wrap=True))  # commands are copied as one line

    def show(self, report: Iterable[ConsoleRenderable]) -> None:
        """Prints the parts of a report; nothing with --json."""
        if not self._json:
            self._release()
            for part in report:
                self._print(self._out, part)

    def step(self, heading: str, explanation: str = "") -> None:
        """Prints the heading of a step."""
        self.show([Text(f"\n{heading}", style="bold cyan"), Text(explanation and f"{explanation}\n", style="cyan")])

    def result(self, content: Mapping[str, Any], report: Iterable[ConsoleRenderable] = ()) -> None:
        """Prints the result: the object with --json, else the report. Only the main process prints."""
        if not _is_main():
            return
        self.loading.stop()
        if self._json:
            try:
                self._stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
                self._stdout.flush()
            except BrokenPipeError:
                discard(self._stdout)
        self._release()  # not before: if the disk behind stdout is full, the error is the only line
        self.show(report)

    @contextlib.contextmanager
    def progress(self, doing: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar, where stderr is a terminal; yields a `Progress`."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with self.bars(*columns) as bars:
            task = bars.add_task(doing, total=None)

            def advance(done: int, of: int) -> None:
                bars.start()  # only at the first update: notes come first
                if done < bars.tasks[0].completed:  # another pass over the same images
                    bars.reset(task)
                bars.update(task, completed=done, total=of)

            yield advance

    @contextlib.contextmanager
    def bars(self, *columns: ProgressColumn, expand: bool = False) -> Iterator[Progress]:
        """Bars on stderr, to be started; they never show where it is no terminal, and are gone in the end."""
        shown = self._err.is_terminal
        bars = _Bars(*columns, console=self._err, transient=True, expand=expand, disable=not shown)
        bars.before = self.loading.stop
        self._has_bars = shown
        try:
            yield bars
        finally:
            if bars.live.is_started:  # else Rich 14.0 prints an empty line
                bars.stop()
            self._has_bars = False

    def _print(self, console: Console, renderable: ConsoleRenderable) -> None:
        """Prints above the bars: those know of nothing that another console writes to the same terminal."""
        self.loading.stop()
        _print(self._err if self._has_bars and console.is_terminal else console, renderable)


@contextlib.contextmanager
def open_terminal(context: typer.Context, *, as_json: bool) -> Iterator[Terminal]:
    """A terminal around the body of a command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an encoding without "×" prints "?" instead of failing
            stream.reconfigure(errors="replace")
    terminal = Terminal(as_json=as_json)
    debug = bool(context.find_root().params.get("debug"))
    with contextlib.redirect_stdout(sys.stderr), contextlib.nullcontext() if debug else _quiet_libraries():
        try:
            yield terminal
        finally:
            terminal.loading.stop()


def _is_main() -> bool:
    """Whether this is the process that prints; one that has not even loaded torch is alone."""
    if "torch" not in sys.modules:
        return True
    from equalize.distributed import is_main

    return is_main()


def _print(console: Console, renderable: ConsoleRenderable) -> None:
    """Prints names in full: where the terminal is too narrow for one, the terminal wraps it, and it can be copied."""
    if isinstance(renderable, Table) and console.is_terminal:
        for number, part in enumerate(fitted(renderable, console)):
            if number:
                console.print()
            _print_whole(console, part)
    else:
        _print_whole(console, renderable)


def _print_whole(console: Console, renderable: ConsoleRenderable) -> None:
    if isinstance(renderable, Table):
        least = width(renderable, console)
    else:
        measured = Measurement.get(console, console.options.update(max_width=WIDEST), renderable)
        least = measured.maximum if isinstance(renderable, Text) and renderable.no_wrap else measured.minimum
    needed = max(console.width, least)
    if console.is_terminal:
        segments = console.render(renderable, console.options.update(width=needed))
        console.print(Segments(segments), soft_wrap=True)
        return
    wide = _console(console.file, needed)
    with wide.capture() as capture:
        wide.print(renderable, crop=False)
    for line in capture.get().splitlines():  # without the blanks that Rich fills lines up with
        wide.out(line.rstrip(), highlight=False)


def _console(file: IO[str], width: int | None = None) -> Console:
    return _Console(file=file, width=width, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
