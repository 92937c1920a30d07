"""A comparison on a terminal."""

from collections.abc import Iterator, Sequence

from rich.console import ConsoleRenderable
from rich.table import Table
from rich.text import Text

from equalize.cli.tables import indented, report_table
from equalize.commands.compare.compare import Comparison
from equalize.commands.compare.report import (
    CONFIRMED,
    confirmed_legend,
    confirmed_rows,
    headings,
    legend,
    rows_of,
    sentences,
)


def comparison_report(found: Comparison) -> Iterator[ConsoleRenderable]:
    """What ran, a row for each arm and rate, and three lines for each arm."""
    yield from (Text(), _as_table(headings(found), rows_of(found)), Text(), Text(legend(found)))
    if found.confirmed:
        confirmed = _as_table(CONFIRMED, confirmed_rows(found))
        yield from (Text(), confirmed, Text(), Text(confirmed_legend(found)))
    for verdict in found.verdicts:
        yield Text(f"\n{verdict.arm} against {verdict.baseline}", style="bold")
        for question, said in sentences(verdict):
            yield indented(f"{question}: {said}")


def _as_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = report_table(*headings, left=("arm",))
    for row in rows:
        table.add_row(*map(Text, ("", *row)))
    return table
