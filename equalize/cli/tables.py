"""Tables on a terminal that is narrower than they are, and indented text."""

from collections.abc import Collection

from rich.console import Console, ConsoleRenderable
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDEST = 10_000
"""Columns of a terminal on which everything fits."""


def fitted(table: Table, console: Console) -> list[Table]:
    """The table, or tables below one another that have its columns in order: no cell is cut or wrapped.

    Each repeats the first columns that tell the rows apart. One that is too wide even so holds a single further column.
    """
    if width(table, console) <= console.width:
        return [table]
    key = _key(table)
    parts: list[list[int]] = []
    for column in range(len(key), len(table.columns)):
        wider = [*parts[-1], column] if parts else []
        if wider and width(_part(table, wider), console) <= console.width:
            parts[-1] = wider
        else:
            parts.append([*key, column])
    return [_part(table, columns) for columns in parts] or [table]


def _key(table: Table) -> list[int]:
    """The first columns, up to three, the fewest in which no two rows are the same; one may be blank and indent."""
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    most = min(3, len(cells) - 1)
    for number in range(1, most):
        rows = list(zip(*cells[:number], strict=True))
        if len(set(rows)) == len(rows) and any(map("".join, rows)):
            return list(range(number))
    return list(range(most))


def _part(table: Table, columns: list[int]) -> Table:
    part = Table(box=table.box, padding=table.padding, pad_edge=table.pad_edge, header_style=table.header_style)
    chosen = [table.columns[column] for column in columns]
    for column in chosen:
        part.add_column(column.header, justify=column.justify, style=column.style, no_wrap=True)
    for cells in zip(*(column.cells for column in chosen), strict=True):
        part.add_row(*cells)
    return part


def indented(content: ConsoleRenderable | str, columns: int = 2, style: str = "") -> ConsoleRenderable:
    """Text, or anything else, that begins in a later column; its lines are no longer than it is."""
    text = Text(content, style=style) if isinstance(content, str) else content
    return Padding(text, (0, 0, 0, columns), expand=False)


def report_table(*headings: str, left: Collection[str] = ()) -> Table:
    """An indented table without lines, numbers set to the right; `left` are the headings of words."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="dim")
    table.add_column()  # indents
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


def width(table: Table, console: Console) -> int:
    """Columns that a table needs; Rich gives a first column without characters one that it does not measure."""
    blank = not any(map(str, (table.columns[0].header, *table.columns[0].cells)))
    return blank + Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
