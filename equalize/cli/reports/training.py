"""Scores and trainings as Rich renderables."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import ConsoleRenderable
from rich.table import Table
from rich.text import Text

from equalize.cli.tables import indented, report_table
from equalize.commands.finetune.finetune import Finetuned
from equalize.commands.report.words import percent
from equalize.messages import counted
from equalize.metrics import ClassScore, Score

_FILES: Mapping[str, str] = {
    "report.html": "all of it, with pictures where matplotlib is installed",
    "metrics.jsonl": "losses and scores by step",
    "finetune.yaml": "MODEL, data and every setting, for --config",
    "last": "for --resume",
    "last/model": "the model of the last step",
}


def score_report(score: Score) -> Iterator[ConsoleRenderable]:
    """A row for each class, `-` where it is absent, and the means."""
    means = f"mIoU {percent(score.mIoU)}  mAcc {percent(score.mAcc)}  aAcc {percent(score.aAcc)}"
    yield from (Text(), _class_table(score.classes, score.left_out), Text())
    yield Text(f"{means}  over {counted(score.images, 'image')}", style="bold")


def _class_table(rows: Sequence[ClassScore], left_out: int | None) -> Table:
    table = report_table("class", "name", "IoU %", "Acc %", "pixels", left=("class", "name"))
    for row in rows:
        if row.id != left_out:
            cells = ("", str(row.id), row.name, percent(row.IoU), percent(row.Acc), str(row.pixels))
            table.add_row(*map(Text, cells))
    return table


def training_report(done: Finetuned) -> Iterator[ConsoleRenderable]:
    """The classes as the best model has them, steps and scores, and where everything is."""
    if done.best is not None:
        rows = [ClassScore(**row) for row in done.best["classes"]]
        yield from (Text(), _class_table(rows, done.left_out))
    yield Text(f"\n{done.steps} steps, {done.epochs:.3g} epochs, {done.seconds:.0f} s in this sitting")
    if done.losses:
        first, last = done.losses[0], done.losses[-1]
        yield Text(f"loss {first[1]:.4g} at step {first[0]}, {last[1]:.4g} at step {last[0]}")
    for what, line in (("best", done.best), ("last", done.last)):
        if line is not None and (what == "best" or line != done.best):
            yield Text(f"{what}: mIoU {percent(line['mIoU'])}  aAcc {percent(line['aAcc'])}  at step {line['step']}")
    which = f"the best model, of step {done.best['step']}" if done.best else "the model of the last step"
    yield Text(f"wrote {done.output}: {which}")
    for name, what in _FILES.items():
        if (place := Path(done.output, name)).exists():
            yield indented(f"{place}: {what}")
