"""A page for a browser: one file with everything in it, and its pictures beside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from equalize.commands.report.style import Picture
from equalize.version import __version__

__all__ = ["Section", "Table", "write_page"]

PAGE_FILE = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text; the first column is set to the left, the others to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


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


def write_page(directory: Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes `report.html`, which needs no other file and no network, and a PNG for each picture.

    Args:
        directory: exists; files of the same names are replaced.
        title: of the page. sections: in order; all text is escaped.

    Returns:
        The page's path.
    """
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("page.html")
    page = directory / PAGE_FILE
    page.write_text(template.render(title=title, sections=sections, version=__version__, uri=_uri), encoding="utf-8")
    for picture in (each for section in sections for each in section.pictures):
        (directory / f"{picture.name}.png").write_bytes(picture.light)
    return page


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
