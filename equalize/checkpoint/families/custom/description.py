"""What the directory of a user's own network says; no torch."""

from pathlib import Path

from equalize.checkpoint.description import Description
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, read_json


class CustomDescription(Description):
    """Networks that a factory in the user's own code builds."""

    name = "custom"

    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """Code that uses `equalize.load`; empty for a repository, which lacks the factory's code."""
        if repository is not None:
            return ""
        arch = read_json(out / ARCHITECTURE_FILE).get("arch")
        return f'import equalize\n\nmodel = equalize.load("{out}", "{arch}").model'
