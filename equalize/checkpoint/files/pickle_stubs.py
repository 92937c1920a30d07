"""Stand-ins for what a training leaves beside the weights, from its arguments to mmengine's histories of losses.

A pickle makes such objects by naming functions. Under `SAFE_GLOBALS` these names stand for classes that only note what
they were called with: no function of numpy, no `getattr` and nothing of mmengine runs on what a stranger wrote. When a
checkpoint is saved again, the note is pickled as the call that it was read from.
"""

import importlib
import pickle
import re
from typing import Any, ClassVar, Self

from equalize.errors import ResourceError

_PLAIN_DTYPE = re.compile(r"[<>=|]?([biuf][1248]|c(8|16)|b1|\?)")
_STATISTICS = ("min", "max", "current", "mean")


class _Note:
    """A call in a pickle, not carried out."""

    home: ClassVar[tuple[str, str]]
    """The module and the name of what was to be called."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> Self:
        note = object.__new__(cls)
        note.args = args
        return note

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return _real(type(self)), tuple(map(_real, self.args)), self.state


class _NoBytes(_Note):
    """How a pickle of protocol 2 spells ``b""``, as in an empty array."""

    home = ("builtins", "bytes")

    def __new__(cls, *args: Any) -> Self:
        if args:
            raise pickle.UnpicklingError("GLOBAL builtins.bytes")
        return super().__new__(cls)


class _Dtype(_Note):
    """Of plain numbers only: others can make numpy take bytes for objects, wherever the checkpoint goes from here."""

    home = ("numpy", "dtype")

    def __new__(cls, *args: Any) -> Self:
        if not args or not isinstance(args[0], str) or not _PLAIN_DTYPE.fullmatch(args[0]):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype of other than plain numbers")
        return super().__new__(cls, *args)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[2:] != (None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype of other than plain numbers")
        super().__setstate__(state)


class _History(_Note):
    home = ("mmengine.logging.history_buffer", "HistoryBuffer")


class _Getattr(_Note):
    """How a pickle of protocol 2 names a method; those that a history always has are the only ones let pass."""

    home = ("builtins", "getattr")

    def __new__(cls, *args: Any) -> Self:
        if len(args) != 2 or args[0] is not _History or args[1] not in _STATISTICS:
            raise pickle.UnpicklingError("GLOBAL builtins.getattr")
        return super().__new__(cls, *args)


_UNCHECKED = (
    ("argparse", "Namespace"),
    ("pathlib", "PosixPath"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
)
_OTHER_HOMES = {"numpy._core.multiarray": "numpy.core.multiarray", "pathlib": "pathlib._local"}
"""Of numpy 1, and of Python 3.13 alone."""
_NOTES: list[Any] = [_NoBytes, _Dtype, _History, _Getattr]
_NOTES += [type(home[1], (_Note,), {"home": home}) for home in _UNCHECKED]
SAFE_GLOBALS: list[Any] = [
    (note, f"{place}.{note.home[1]}")
    for note in _NOTES
    for place in (note.home[0], _OTHER_HOMES.get(note.home[0]))
    if place is not None
]
"""For `torch.serialization.safe_globals`: what stands in for which name."""


def _real(value: Any) -> Any:
    """The function or class that a note stands for, to be named in a pickle; anything else as it is."""
    if not (isinstance(value, type) and issubclass(value, _Note)):
        return value
    module, name = value.home
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ResourceError(
            module, "is needed to write this checkpoint", remedy="pip install 'equalize[mmseg]'"
        ) from error
