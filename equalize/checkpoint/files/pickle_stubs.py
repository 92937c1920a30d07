"""Inert stubs for objects that training code saves beside the weights, such as arguments and mmengine's loss histories.

A pickle makes such objects by calling named functions. `SAFE_GLOBALS` maps these names to classes that only record the
arguments: no function of numpy, no `getattr` and no code of mmengine runs while a file is read. When a checkpoint is
saved again, the record is pickled as the call that it was read from.
"""

import importlib
from typing import Any, ClassVar, Self

from equalize.errors import ResourceError


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


_FUNCTIONS = (
    ("argparse", "Namespace"),
    ("pathlib", "PosixPath"),
    ("builtins", "bytes"),  # how a pickle of protocol 2 spells b"", as in an empty array
    ("builtins", "getattr"),  # and a method, as in the histories of mmengine
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("mmengine.logging.history_buffer", "HistoryBuffer"),
)
_OTHER_MODULES = {"numpy._core.multiarray": "numpy.core.multiarray", "pathlib": "pathlib._local"}
"""Of numpy 1, and of Python 3.13 alone."""
SAFE_GLOBALS: list[Any] = [
    (note, f"{place}.{name}")
    for module, name in _FUNCTIONS
    for note in [type(name, (_Note,), {"target": (module, name)})]
    for place in (module, _OTHER_MODULES.get(module))
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
        raise ResourceError(
            module, "is needed to write this checkpoint", remedy="pip install 'equalize[mmseg]'"
        ) from error
