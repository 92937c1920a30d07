import io

import pytest
from rich.console import Console

from equalize.cli.reports.comparison import _as_table
from equalize.cli.reports.training import _class_table
from equalize.cli.terminal import _print
from equalize.commands.compare.report import COMPARED
from equalize.metrics import ClassScore

ROW = [
    "migrate",
    "0.0001",
    "2.11 -> 1.00",
    "89.13 ± 0.14",
    "+0.01",
    "-0.04 to +0.06",
    "-0.00 to +0.02",
    "89.22 ± 0.04",
    "+0.00",
]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_narrow_terminal_gets_every_column_in_whole_words(width):
    file = io.StringIO()
    _print(Console(file=file, width=width, force_terminal=True, color_system=None), _as_table(COMPARED, [ROW]))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert all(each in text for each in (*COMPARED, *ROW))


def test_what_is_redirected_is_one_table():
    file = io.StringIO()
    _print(Console(file=file, width=80), _as_table(COMPARED, [ROW]))
    heading, row = file.getvalue().splitlines()
    assert all(each in heading for each in COMPARED)
    assert all(each in row for each in ROW)


def test_numbers_of_a_wide_table_of_classes_are_whole():
    file = io.StringIO()
    rows = [ClassScore(id=0, name="a name as long as the line " * 4, IoU=10.0, Acc=50.0, pixels=1234567)]
    _print(Console(file=file, width=80), _class_table(rows, None))
    assert file.getvalue().splitlines()[1].endswith("1234567")
