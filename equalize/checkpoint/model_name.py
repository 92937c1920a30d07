"""How a user names a model."""

from dataclasses import dataclass, replace

from equalize.checkpoint import Checkpoint
from equalize.checkpoint.load import load_request
from equalize.checkpoint.request import Request

__all__ = ["ModelName"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelName(Request):
    """MODEL and the flags that go with it."""

    def load(self, *, weights: bool = True) -> Checkpoint:
        """Loads it; without weights on the meta device."""
        return load_request(replace(self, weights=weights))
