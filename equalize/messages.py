"""What long work reports while it runs; numbers and lists in sentences."""

from collections.abc import Callable, Sequence

Notify = Callable[[str], None]
"""Called with a line of information for the user."""

Progress = Callable[[int, int], None]
"""Called with the number of images or steps done, and their total."""


def ignore(line: str) -> None:
    """A `Notify` that drops the line."""


def ignore_progress(done: int, of: int) -> None:
    """A `Progress` that shows nothing."""


class TrainingMonitor:
    """Is told what a training does as it happens; this one drops it."""

    def for_run(self, name: str, number: int, of: int) -> "TrainingMonitor":
        """The monitor of one of several trainings; `number` counts from 0."""
        return self

    def began(self) -> None:
        """OUT is this training's own from now on."""

    def working(self, doing: str, done: int, of: int) -> None:
        """Images done of a pass over them: ``measuring`` and ``caching`` before the first step, ``scoring``."""

    def stepped(self, step: int, of: int) -> None:
        """Steps done."""

    def logged(self, step: int, of: int, *, loss: float, lr: float) -> None:
        """The mean loss since the last call."""

    def scored(self, step: int, of: int, *, miou: float | None, best_before: float | None) -> None:
        """An evaluation, in percent, and the best before it."""

    def wrote(self) -> None:
        """The model is in OUT."""


SILENT = TrainingMonitor()


def one_line(error: BaseException) -> str:
    """The kind of an error of other code and what it says, on one line and not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_of(names: Sequence[str], shown: int = 3) -> str:
    """The first names and how many more there are: `a, b, c and 4 more`."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
