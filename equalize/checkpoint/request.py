"""What the caller of `load` asked for, passed down unchanged."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of `load`."""

    source: str
    """As typed."""
    arch: str | None = None
    arch_args: Mapping[str, object] = field(default_factory=dict)
    weights: bool = True
    """False: on the meta device, for looking at the structure alone."""
    init_missing: bool = False
    num_classes: int | None = None
    seed: int = 0
