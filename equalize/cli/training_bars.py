"""A training as it goes on: bars on a terminal, else a line for each log, evaluation and model."""

import contextlib
from collections.abc import Iterator

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from equalize.cli.terminal import Terminal
from equalize.messages import TrainingMonitor

_NO_FACTS = {"loss": "", "lr": "", "mIoU": ""}  # in the order of the bar


@contextlib.contextmanager
def training_bars(terminal: Terminal, out: str) -> Iterator["TrainingBars"]:
    """Shows one training, or several one after another."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(compact=True),
    )
    with terminal.bars(*columns, expand=True) as bars:
        yield TrainingBars(terminal, bars, out)


class TrainingBars(TrainingMonitor):
    """Tells a terminal of a training, or lines if notes go to none; `out` is OUT as typed.

    Of the bars one is of the steps with loss, rate and mIoU in it, one of the images that are measured or scored.
    """

    has_begun = False
    """Whether what is in OUT is this training's."""

    def __init__(self, terminal: Terminal, bars: Progress, out: str) -> None:
        self._terminal = terminal
        self._bars = bars
        self._out = out
        self._steps: TaskID | None = None
        self._images: TaskID | None = None
        self._facts = dict(_NO_FACTS)
        self._run, self._number, self._runs = "", 0, 1

    def for_run(self, name: str, number: int, of: int) -> TrainingMonitor:
        """Names the run in each line; the bar of the steps is that of all runs."""
        self._run, self._number, self._runs = name, number, of
        self._facts = dict(_NO_FACTS)
        return self

    def began(self) -> None:
        """From now on the training can be resumed."""
        self.has_begun = True

    def working(self, doing: str, done: int, of: int) -> None:
        """A bar of its own as long as the pass goes on."""
        if self._images is not None and done < of:
            self._bars.update(self._images, description=f"{doing} {done}/{of}", completed=done)
        elif self._images is not None:
            self._bars.remove_task(self._images)
            self._images = None
        elif done < of:
            self._images = self._bars.add_task(f"{doing} {done}/{of}", completed=done, total=of, facts="")
            self._bars.start()  # not before: notes come first

    def stepped(self, step: int, of: int) -> None:
        """Moves the bar of the steps."""
        if self._steps is None:
            self._steps = self._bars.add_task("", facts="")
            self._bars.start()
        run = f"run {self._number + 1}/{self._runs} " if self._runs > 1 else ""
        self._bars.update(
            self._steps,
            description=f"{run}step {step}/{of}",
            completed=self._number * of + step,
            total=self._runs * of,
            facts="  ".join(filter(None, self._facts.values())),
        )

    def logged(self, step: int, of: int, *, loss: float, lr: float) -> None:
        """`step 20/60 loss 2.06 lr 7.0e-04`."""
        self._facts |= {"loss": f"loss {loss:.3g}", "lr": f"lr {lr:.1e}"}
        self._redraw(step, of)
        if not self._terminal.notes_are_seen:
            self._report(f"step {step}/{of} loss {loss:.3g} lr {lr:.1e}")

    def scored(self, step: int, of: int, *, miou: float | None, best_before: float | None) -> None:
        """`val mIoU 14.2 (best) at step 20/60`."""
        said = f"mIoU {_percent(miou)}"
        self._facts["mIoU"] = said
        self._redraw(step, of)
        is_best = miou is not None and (best_before is None or miou > best_before)
        best = "best" if is_best else f"best {_percent(best_before)}"
        if self._runs == 1 or not self._terminal.notes_are_seen:
            self._report(f"val {said} ({best}) at step {step}/{of}")

    def wrote(self) -> None:
        """`saved OUT`."""
        if not self._terminal.notes_are_seen:
            self._report(f"saved {self._out}")

    def _redraw(self, step: int, of: int) -> None:
        """At once, not with the next of Rich's own turns: a line may follow."""
        self.stepped(step, of)
        self._bars.refresh()

    def _report(self, line: str) -> None:
        self._terminal.report(f"{self._run}: {line}" if self._run else line)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
