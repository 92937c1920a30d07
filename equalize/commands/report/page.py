"""A page for a browser: one file with everything in it, and its pictures beside it."""

import base64
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from equalize.commands.report.style import Picture, can_draw
from equalize.errors import OutputError, ResourceError
from equalize.version import __version__

PAGE_FILE = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text; the first column is set to the left, the others to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: bool = False
    """Whether all columns are set to the left, and wrapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page, in the order of its fields."""

    heading: str
    verdict: str = ""
    """The one sentence to be read first."""
    paragraphs: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None
    code: str = ""
    """Commands or settings, shown as they are."""


def demand_report(directory: str | Path) -> None:
    """Refuses early what would fail once the work is done.

    Raises:
        ResourceError: matplotlib is not installed. OutputError: the place is no directory.
    """
    if not can_draw():
        raise ResourceError("--report", "needs matplotlib", remedy="pip install 'equalize[plot]'")
    if os.path.exists(place := os.path.expanduser(directory)) and not os.path.isdir(place):
        raise OutputError(directory, "is no directory", remedy="give --report another place")


def write_page(directory: str | Path, title: str, sections: Iterable[Section]) -> Path:
    """Writes `report.html`, which needs no other file and no network, and a PNG for each picture; returns its path.

    The directory is made if it does not exist, files of the same names are replaced, and all text is escaped.
    """
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("page.html")
    directory, sections = Path(os.path.expanduser(directory)), list(sections)
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / PAGE_FILE
    text = template.render(title=title, sections=sections, version=__version__, uri=_uri)
    page.write_text(text, encoding="utf-8", errors="replace")  # names of files may be no text
    for picture in (each for section in sections for each in section.pictures):
        (directory / f"{picture.name}.png").write_bytes(picture.light)
    return page


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
