"""Scores and trainings as Rich renderables."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import ConsoleRenderable
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from equalize.cli.tables import report_table
from equalize.commands.finetune.finetune import Finetuned
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
    images = "1 image" if score.images == 1 else f"{score.images} images"
    means = f"mIoU {_percent(score.mIoU)}  mAcc {_percent(score.mAcc)}  aAcc {_percent(score.aAcc)}"
    yield from (Text(), _class_table(score.classes, score.left_out), Text())
    yield Text(f"{means}  over {images}", style="bold")


def _class_table(rows: Sequence[ClassScore], left_out: int | None) -> Table:
    table = report_table("class", "name", "IoU %", "Acc %", "pixels", left=("class", "name"))
    for row in rows:
        if row.id != left_out:
            cells = ("", str(row.id), row.name, _percent(row.IoU), _percent(row.Acc), str(row.pixels))
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
            yield Text(f"{what}: mIoU {_percent(line['mIoU'])}  aAcc {_percent(line['aAcc'])}  at step {line['step']}")
    which = f"the best model, of step {done.best['step']}" if done.best else "the model of the last step"
    yield Text(f"wrote {done.output}: {which}")
    for name, what in _FILES.items():
        if (place := Path(done.output, name)).exists():
            yield Padding(Text(f"{place}: {what}"), (0, 0, 0, 2), expand=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
