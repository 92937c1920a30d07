"""The choice between columns, and between configurations, that the name of a data set may end with.

data.parquet:image=photo,label=mask
org/name@revision:config=en,label=mask
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["Choice"]

_CHOICE = re.compile(r":((?:config|image|label)=[^,=]+(?:,(?:config|image|label)=[^,=]+)*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What of a table is meant, where it is not clear.

    Attributes:
        place: the file, the folder or the Hub id.
        image, label: columns.
        config: the configuration of a data set on the Hub.
    """

    place: str
    image: str | None = None
    label: str | None = None
    config: str | None = None

    @classmethod
    def of(cls, source: str | Path) -> Self:
        """Takes the choice off the name of a data set; a file of the whole name goes first."""
        name = os.fspath(source)
        found = None if os.path.lexists(name) else _CHOICE.search(name)
        if found is None:
            return cls(place=name)
        return cls(place=name[: found.start()], **dict(pair.split("=") for pair in found[1].split(",")))

    def __bool__(self) -> bool:
        return any((self.image, self.label, self.config))
