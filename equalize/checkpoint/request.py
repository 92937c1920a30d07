"""`Request`: the arguments of `load`, passed down unchanged."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from equalize.checkpoint.preprocess import Override


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """MODEL and its flags."""

    source: str
    """MODEL as the user typed it."""
    arch: str | None = None
    """``--arch``, else the one in architecture.json beside the weights."""
    arch_args: Mapping[str, object] = field(default_factory=dict)
    init_missing: bool = False
    num_classes: int | None = None
    seed: int = 0
    preprocess: Override = field(default_factory=Override)
    """What the user says of the preprocessing."""

    @property
    def scheme(self) -> str | None:
        """The part of ``--arch`` before the colon: a library, or a file or module of the user's."""
        return None if self.arch is None else self.arch.partition(":")[0]

    @property
    def arch_name(self) -> str:
        """The part of ``--arch`` after the first colon."""
        return "" if self.arch is None else self.arch.partition(":")[2]
