"""Predictions as Rich renderables."""

from collections.abc import Iterator

from rich.console import ConsoleRenderable
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from equalize.commands.predict.files import Predictions

__all__ = ["predictions_report"]


def predictions_report(done: Predictions) -> Iterator[ConsoleRenderable]:
    """A row for each class that occurs, the largest first, and what was written."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for column in ("class", "name", "color"):
        table.add_column(column, overflow="fold")
    for column in ("pixels", "share"):
        table.add_column(column, justify="right")
    for row in sorted(done.classes, key=lambda each: -each.pixels):
        if row.pixels:
            table.add_row(str(row.id), row.name, row.color, str(row.pixels), f"{row.share:.1%}")
    masks = f"{len(done.files)} mask{'s' * (len(done.files) != 1)}"
    overlays = "overlays, " if any(file.overlay for file in done.files) else ""
    yield from (Text(), Padding(table, (0, 0, 0, 2)), Text())
    yield Text(f"wrote {done.output}: {masks}, {overlays}legend.png, predictions.json", style="bold")
