"""Inert stubs for objects that training code saves beside the weights, such as arguments and mmengine's loss histories.

A pickle makes such objects by calling named functions. `SAFE_GLOBALS` maps these names to classes that only record the
arguments: no function of numpy, no `getattr` and no code of mmengine runs while a file is read. When a checkpoint is
saved again, the record is pickled as the call that it was read from.
"""

import importlib
import pickle
import re
from collections.abc import Callable, Mapping
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
        if cls.target in _ALLOWED and not _ALLOWED[cls.target](args):
            raise _refusal(cls.target)
        note = object.__new__(cls)
        note.args = args
        return note

    def __setstate__(self, state: Any) -> None:
        is_plain = isinstance(state, tuple) and state[2:] == (None, None, None, -1, -1, 0)
        if self.target == _DTYPE and not is_plain:
            raise _refusal(self.target)
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return _real(type(self)), tuple(map(_real, self.args)), self.state


class _History(_Note):
    target = ("mmengine.logging.history_buffer", "HistoryBuffer")


_BYTES, _GETATTR, _DTYPE = ("builtins", "bytes"), ("builtins", "getattr"), ("numpy", "dtype")
_ALLOWED: Mapping[tuple[str, str], Callable[[tuple[Any, ...]], bool]] = {
    _BYTES: lambda args: not args,
    _GETATTR: lambda args: len(args) == 2 and args[0] is _History and args[1] in _STATISTICS,
    _DTYPE: lambda args: bool(args) and isinstance(args[0], str) and bool(_PLAIN_DTYPE.fullmatch(args[0])),
}
"""The arguments that are let pass. Pickles of protocol 2 call ``bytes()`` for an empty array, and ``getattr`` for a
method of a history; of dtypes, an object's can make numpy read bytes as pointers later."""
_OTHERS = (
    ("argparse", "Namespace"),
    ("pathlib", "PosixPath"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
)
_OTHER_MODULES = {"numpy._core.multiarray": "numpy.core.multiarray", "pathlib": "pathlib._local"}
"""Of numpy 1, and of Python 3.13 alone."""
_NOTES: list[Any] = [_History]
_NOTES += [type(target[1], (_Note,), {"target": target}) for target in (*_ALLOWED, *_OTHERS)]
SAFE_GLOBALS: list[Any] = [
    (note, f"{place}.{note.target[1]}")
    for note in _NOTES
    for place in (note.target[0], _OTHER_MODULES.get(note.target[0]))
    if place is not None
]
"""For `torch.serialization.safe_globals`: pairs of stub and name."""


def _refusal(target: tuple[str, str]) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"GLOBAL {'.'.join(target)}")


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
