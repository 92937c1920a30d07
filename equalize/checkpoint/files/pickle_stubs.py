"""Inert stubs for objects that training code saves beside the weights, such as arguments and mmengine's loss histories.

A pickle makes such objects by calling named functions. `SAFE_GLOBALS` maps these names to classes that only record the
arguments: no function of numpy, no `getattr` and no code of mmengine runs while a file is read. When a checkpoint is
saved again, the record is pickled as the call that it was read from.
"""

import importlib
import pickle
import re
from typing import Any, ClassVar, Self

from equalize.errors import ResourceError

_PLAIN_DTYPE = re.compile(r"[<>=|]?([biuf][1248]|c(8|16)|b1|\?)")
_STATISTICS = ("min", "max", "current", "mean")


class _Note:
    """A call in a pickle, recorded and not carried out."""

    target: ClassVar[tuple[str, str]]
    """Module and name of the function."""

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
    """``bytes()``, which pickles of protocol 2 call for an empty array; with arguments it is refused."""

    target = ("builtins", "bytes")

    def __new__(cls, *args: Any) -> Self:
        if args:
            raise pickle.UnpicklingError("GLOBAL builtins.bytes")
        return super().__new__(cls)


class _Dtype(_Note):
    """``numpy.dtype`` of plain numbers only: an object dtype can make numpy read bytes as pointers later."""

    target = ("numpy", "dtype")

    def __new__(cls, *args: Any) -> Self:
        if not args or not isinstance(args[0], str) or not _PLAIN_DTYPE.fullmatch(args[0]):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype of other than plain numbers")
        return super().__new__(cls, *args)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[2:] != (None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype of other than plain numbers")
        super().__setstate__(state)


class _History(_Note):
    target = ("mmengine.logging.history_buffer", "HistoryBuffer")


class _Getattr(_Note):
    """``getattr``, which pickles of protocol 2 call for a method; only a history's own statistics are allowed."""

    target = ("builtins", "getattr")

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
_OTHER_MODULES = {"numpy._core.multiarray": "numpy.core.multiarray", "pathlib": "pathlib._local"}
"""Of numpy 1, and of Python 3.13 alone."""
_NOTES: list[Any] = [_NoBytes, _Dtype, _History, _Getattr]
_NOTES += [type(target[1], (_Note,), {"target": target}) for target in _UNCHECKED]
SAFE_GLOBALS: list[Any] = [
    (note, f"{place}.{note.target[1]}")
    for note in _NOTES
    for place in (note.target[0], _OTHER_MODULES.get(note.target[0]))
    if place is not None
]
"""For `torch.serialization.safe_globals`: pairs of stub and name."""


def _real(value: Any) -> Any:
    """The function or class of a stub, to be named in a pickle; any other value as it is."""
    if not (isinstance(value, type) and issubclass(value, _Note)):
        return value
    module, name = value.target
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        remedy = "pip install 'equalize[mmseg]'"
        raise ResourceError(module, "is needed to write this checkpoint", remedy=remedy) from error
