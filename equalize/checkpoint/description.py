"""What a directory says of its network, from names and JSON files alone; nothing here needs torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, read_json


class Description(ABC):
    """The facts of a library, or of the user's own code. The defaults are those of a state dict with a record."""

    name: ClassVar[str]
    library: ClassVar[str | None] = None
    """Its library name on the Hub."""
    scheme: ClassVar[str | None] = None
    """The part of its ``--arch`` before the colon; None where that is a file or module of the user's."""
    config_field: ClassVar[str | None] = None
    """A field of ``config.json`` that only its directories have."""

    def describes(self, config: Mapping[str, object]) -> bool:
        """Whether a ``config.json`` is of its library."""
        return self.config_field is not None and self.config_field in config

    def architecture(self, out: Path) -> str:
        """The class or function that builds what was written to a directory; by default by the record there."""
        return str(read_json(out / ARCHITECTURE_FILE).get("arch")).rpartition(":")[2]

    @abstractmethod
    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """Lines of Python that load what was written to a directory; empty if that needs code that only its author has.

        With ``repository``, ORG/NAME on the Hub, and its ``revision`` they load it from there: the files are the same.
        """
