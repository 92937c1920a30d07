"""What a data set is made of: files, or cells of a table that open as files do."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

from equalize.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a table of Hugging Face `datasets`; nothing is read before it is opened.

    Attributes:
        table: a `datasets.Dataset` of one column in the format "arrow", memory-mapped; all cells of a column share it.
        origin: the data set and the split, for people.
        row: from 0.
        column: its name.
    """

    table: Any = field(repr=False, compare=False)
    origin: str
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.origin}[{self.row}].{self.column}"

    @property
    def name(self) -> str:
        """The last part of what `str` gives, as of a path."""
        return f"[{self.row}].{self.column}"

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """The encoded picture, byte by byte as it was stored.

        Raises:
            DataError: the cell is empty. OSError: it names a file, and that cannot be opened.
        """
        stored = self.table[self.row].column(0)[0].as_py()
        if not isinstance(stored, dict):
            stored = {"bytes": stored}
        if stored.get("bytes") is not None:
            return BytesIO(stored["bytes"])
        if stored.get("path") is not None:
            return Path(stored["path"]).open(mode)
        raise DataError(self, "is empty")


Item = Path | Cell
"""A picture or a mask: something with a name that can be opened."""


def as_item(place: "str | Item") -> Item:
    """Text is a path."""
    return Path(place) if isinstance(place, str) else place
