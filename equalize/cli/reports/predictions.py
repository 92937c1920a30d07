"""Predictions as Rich renderables."""

from collections.abc import Iterator

from rich.console import ConsoleRenderable
from rich.text import Text

from equalize.cli.tables import report_table
from equalize.commands.predict.files import Predictions


def predictions_report(done: Predictions) -> Iterator[ConsoleRenderable]:
    """A row for each class that occurs, the largest first, and what was written."""
    table = report_table("class", "name", "color", "pixels", "share", left=("class", "name", "color"))
    for row in sorted(done.classes, key=lambda each: -each.pixels):
        if row.pixels:
            cells = ("", str(row.id), row.name, row.color, str(row.pixels), f"{row.share:.1%}")
            table.add_row(*map(Text, cells))
    masks = f"{len(done.files)} mask{'s' * (len(done.files) != 1)}"
    overlays = "overlays, " if any(file.overlay for file in done.files) else ""
    yield from (Text(), table, Text())
    yield Text(f"wrote {done.output}: {masks}, {overlays}legend.png, predictions.json", style="bold")
