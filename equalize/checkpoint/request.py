"""What the caller of `load` asked for, passed down unchanged."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """MODEL and the flags that go with it."""

    source: str
    """As typed."""
    arch: str | None = None
    """``--arch``; where a record lies beside the weights, what that says."""
    arch_args: Mapping[str, object] = field(default_factory=dict)
    init_missing: bool = False
    num_classes: int | None = None
    seed: int = 0

    @property
    def scheme(self) -> str | None:
        """What stands before the colon of ``--arch``: a library, or a file or module of the user's."""
        return None if self.arch is None else self.arch.partition(":")[0]

    @property
    def arch_name(self) -> str:
        """What stands behind it."""
        return "" if self.arch is None else self.arch.partition(":")[2]
