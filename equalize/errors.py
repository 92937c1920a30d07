"""The error types of the package and their exit codes.

    EqualizeError
    ├── InputError, a ValueError    2   the user's input or usage is refused
    │   ├── CheckpointError             a model could not be read, recognized or built
    │   ├── DataError                   images or masks could not be read
    │   ├── SiteError                   a network, site or strategy that is not supported
    │   └── OutputError                 the place to write to is refused
    ├── ResourceError               3   memory, disk, device, network, Hub
    ├── NumericsError               4   non-finite values, or a proof that failed
    └── PeerError                       another process failed, and reports it

Errors carry facts (where, what, got, expected, remedy); ``str()`` joins them to the one sentence
the command line prints behind ``error: ``.
"""

from typing import ClassVar


class EqualizeError(Exception):
    """A failure with a known cause.

    Args:
        where: the path, layer, flag or name that the failure is about.
        what: what is wrong with it, as a clause without a full stop.
        got: the value found, if that helps.
        expected: the rule it breaks, if that helps.
        remedy: what to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, where: object, what: str, *, got: object = None, expected: object = None, remedy: str | None = None
    ) -> None:
        self.where = str(where)
        self.what = what
        self.got = got
        self.expected = expected
        self.remedy = remedy
        super().__init__(self.where, what)

    def __str__(self) -> str:
        facts = [f"{self.where}: {self.what}"]
        if self.got is not None:
            facts.append(f"got {self.got}")
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        sentence = ", ".join(facts)
        return f"{sentence}; {self.remedy}" if self.remedy else sentence


class InputError(EqualizeError, ValueError):
    """The user's input or usage is refused."""

    exit_code = 2


class CheckpointError(InputError):
    """A model could not be read, recognized or built."""


class DataError(InputError):
    """Images or masks could not be read."""


class SiteError(InputError):
    """A network, a site or a strategy that is not supported."""


class OutputError(InputError):
    """The place to write to is refused."""


class ResourceError(EqualizeError):
    """Memory, disk, device, network or the Hub failed."""

    exit_code = 3


class NumericsError(EqualizeError):
    """Non-finite values, or a proof that failed."""

    exit_code = 4


class PeerError(EqualizeError):
    """Another process that shares the work failed, and reports the error itself.

    Args:
        code: its exit code, which this process then has too.
    """

    def __init__(self, code: int) -> None:
        super().__init__("another process", "failed")
        self.code = code
