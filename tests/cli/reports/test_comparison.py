import io
import re

import pytest
from rich.console import Console

from equalize.cli.reports.comparison import _FIRST_OUT, _HEADINGS, _FittingTable
from equalize.cli.terminal import _print

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


@pytest.mark.parametrize(
    ("width", "out"),
    [
        (60, {"95 % images", "early", "early difference", "sigmas"}),
        (80, {"95 % images", "early", "early difference"}),
        (100, {"95 % images", "early difference"}),
        (140, set()),
    ],
)
def test_a_narrow_terminal_gets_fewer_columns_and_whole_words(width, out):
    file = io.StringIO()
    terminal = Console(file=file, width=width, force_terminal=True, color_system=None)
    _print(terminal, _FittingTable(_HEADINGS, [ROW], _FIRST_OUT))
    heading, row = file.getvalue().splitlines()
    assert len(heading) <= width
    assert re.split(r" {2,}", heading.strip()) == [each for each in _HEADINGS if each not in out]
    shown = [cell for name, cell in zip(_HEADINGS, ROW, strict=True) if name not in out]
    assert re.split(r" {2,}", row.strip()) == shown


def test_what_is_redirected_has_all_columns():
    file = io.StringIO()
    _print(Console(file=file, width=80), _FittingTable(_HEADINGS, [ROW], _FIRST_OUT))
    assert all(each in file.getvalue() for each in (*_HEADINGS, *ROW))
