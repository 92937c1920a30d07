"""Reads colors from text, a line for each class, with or without a heading that says which columns they are in."""

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

HEX = re.compile(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})\b")
_SEPARATOR = re.compile(r"[,:;|=\t]")
_NUMBER = re.compile(r"(\d+)(?:\.0+)?")
_TITLES = (("r", "g", "b"), ("red", "green", "blue"))
_ALPHA = ("a", "alpha")

_Line = tuple[list[int], list[str]]
"""The numbers that stand together, none if they are fewer than three; and the other cells."""


def read_table(text: str) -> Iterator[tuple[Sequence[int], int | None, str]]:
    """Red, green and blue, index and name of each line that has a color.

    Of four numbers that stand together one is an index, or the last is alpha, as all lines show. A name may have
    numbers in it where cells are separated by more than spaces.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("# ")]
    table = _below_heading(lines) or [_cells(line) for line in lines]
    place = _index_place([numbers for numbers, _ in table if len(numbers) == 4])
    for numbers, others in table:
        if numbers:
            indices = [numbers.pop(place)] if len(numbers) == 4 and place is not None else []
            indices += [number for cell in others if (number := _number(cell)) is not None]
            name = next((cell for cell in others if cell and _number(cell) is None), "")
            yield numbers[:3], indices[0] if indices else None, name


def _below_heading(lines: Sequence[str]) -> list[_Line]:
    """The lines below one that names columns of red, green and blue; none without it."""
    heading = lines[0] if lines else ""
    mark = next((mark for mark in ",;\t|" if mark in heading), ",")
    titles = [title.strip(" \"'#").lower() for title in heading.split(mark)]
    levels = next((names for names in _TITLES if {*names} <= {*titles}), ())
    table: list[_Line] = []
    for cells in csv.reader(lines[1:], delimiter=mark, skipinitialspace=True) if levels else ():
        row = dict(zip(titles, map(str.strip, cells), strict=False))
        numbers = [number for title in levels if (number := _number(row.get(title, ""))) is not None]
        others = [cell for title, cell in row.items() if title not in (*levels, *_ALPHA)]
        table.append((numbers if len(numbers) == 3 else [], others))
    return table


def _cells(line: str) -> _Line:
    """The cells of a line, between commas and their like or, if three numbers do not stand together so, spaces too."""
    line = HEX.sub(lambda found: f" {' '.join(str(int(level, 16)) for level in found.groups())} ", line)
    cells = [cell.strip(" \"'") for cell in _SEPARATOR.split(line)]
    spread = [part for cell in cells for part in (cell.split() if all(map(_is_number, cell.split())) else [cell])]
    words = [word for cell in cells for word in cell.split()]
    joined = [cell for number, run in groupby(words, _is_number) for cell in (run if number else [" ".join(run)])]
    for found in (spread, joined):
        start = 0
        for is_number, run in groupby(found, _is_number):
            stop = start + len([*run])
            if is_number and stop - start >= 3:
                numbers = [number for cell in found[start:stop] if (number := _number(cell)) is not None]
                return numbers, [*found[:start], *found[stop:]]
            start = stop
    return [], []


def _index_place(fours: Sequence[Sequence[int]]) -> int | None:
    """Which of four numbers, by those of all lines, is the index: the first or the last; None if that is alpha."""
    firsts, lasts = ({numbers[place] for numbers in fours} for place in (0, -1))
    if len(fours) > 1 and len(lasts) == 1:
        return None
    return -1 if _counts(lasts, len(fours)) and not _counts(firsts, len(fours)) else 0


def _counts(values: set[int], lines: int) -> bool:
    """Whether values are consecutive, each of one line."""
    return len(values) == lines > 0 and max(values) - min(values) == lines - 1


def _number(cell: str) -> int | None:
    found = _NUMBER.fullmatch(cell.strip("()[]{} \"'"))
    return int(found[1]) if found else None


def _is_number(cell: str) -> bool:
    return _number(cell) is not None
