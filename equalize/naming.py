"""How a user names a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from equalize.checkpoint import Checkpoint, load

__all__ = ["ModelName"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelName:
    """MODEL and the flags that go with it."""

    source: str
    arch: str | None = None
    arch_args: Mapping[str, object] = field(default_factory=dict)
    init_missing: bool = False
    num_classes: int | None = None
    seed: int = 0

    def load(self, *, weights: bool = True) -> Checkpoint:
        """Loads it; without weights on the meta device."""
        return load(
            self.source,
            self.arch,
            self.arch_args,
            weights=weights,
            init_missing=self.init_missing,
            num_classes=self.num_classes,
            seed=self.seed,
        )
