"""Scores and trainings as Rich renderables."""

from collections.abc import Iterator

from rich.console import ConsoleRenderable
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from equalize.commands.finetune.finetune import Finetuned
from equalize.metrics import Score

__all__ = ["score_report", "training_report"]


def score_report(score: Score) -> Iterator[ConsoleRenderable]:
    """A row for each class, `-` where it is absent, and the means."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for column in ("class", "name"):
        table.add_column(column, overflow="fold")
    for column in ("IoU %", "Acc %", "pixels"):
        table.add_column(column, justify="right")
    for row in score.classes:
        if row.id == score.left_out:
            continue
        table.add_row(str(row.id), row.name, _percent(row.IoU), _percent(row.Acc), str(row.pixels))
    means = f"mIoU {_percent(score.mIoU)}  mAcc {_percent(score.mAcc)}  aAcc {_percent(score.aAcc)}"
    images = "1 image" if score.images == 1 else f"{score.images} images"
    yield from (Text(), Padding(table, (0, 0, 0, 2)), Text(), Text(f"{means}  over {images}", style="bold"))


def training_report(done: Finetuned) -> Iterator[ConsoleRenderable]:
    """Steps, scores, the output, and what to do next."""
    yield Text(f"\n{done.steps} steps, {done.epochs:.3g} epochs, {done.seconds:.0f} s in this sitting")
    if done.losses:
        first, last = done.losses[0], done.losses[-1]
        yield Text(f"loss {first[1]:.4g} at step {first[0]}, {last[1]:.4g} at step {last[0]}")
    for what, line in (("best", done.best), ("last", done.last)):
        if line is not None:
            yield Text(f"{what}: mIoU {_percent(line['mIoU'])}  aAcc {_percent(line['aAcc'])}  at step {line['step']}")
    which = "the best model" if done.best else "the model of the last step"
    yield Text(f"wrote {done.output}: {which}, metrics.jsonl, and last/ for --resume")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
