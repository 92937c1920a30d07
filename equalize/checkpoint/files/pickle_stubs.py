"""Stand-ins for what a training leaves beside the weights, from its arguments to mmengine's histories of losses.

A pickle makes such objects by naming functions. Under `SAFE_GLOBALS` these names stand for classes that only note what
they were called with: no function of numpy, no `getattr` and nothing of mmengine runs on what a stranger wrote. When a
checkpoint is saved again, the note is pickled as the call that it was read from.
"""

import importlib
from typing import Any, ClassVar, Self

from equalize.errors import ResourceError


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


_HOMES = (
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
_OTHER_HOMES = {"numpy._core.multiarray": "numpy.core.multiarray", "pathlib": "pathlib._local"}
"""Of numpy 1, and of Python 3.13 alone."""
SAFE_GLOBALS: list[Any] = [
    (note, f"{place}.{name}")
    for module, name in _HOMES
    for note in [type(name, (_Note,), {"home": (module, name)})]
    for place in (module, _OTHER_HOMES.get(module))
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
