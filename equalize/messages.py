"""What long work reports while it runs, and lists that are too long to print in full."""

from collections.abc import Callable, Sequence

Notify = Callable[[str], None]
"""Called with a line of information for the user."""

Progress = Callable[[int, int], None]
"""Called with the number of images or steps done, and their total."""


def ignore(line: str) -> None:
    """A `Notify` that drops the line."""


def ignore_progress(done: int, of: int) -> None:
    """A `Progress` that shows nothing."""


def first_of(names: Sequence[str], shown: int = 3) -> str:
    """The first names and how many more there are: `a, b, c and 4 more`."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
