"""How large a network may be that a checkpoint describes: about as large as what it holds to fill it.

A few bytes of a config can ask for a million layers, or for one as large as all memory. Only what a checkpoint says of
itself is bounded here, and by what it holds, never by a depth of its own; networks that users name are theirs to size.
"""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = ["limit_construction"]

_MOST_TENSORS = 1 << 14  # of a network without weights: eight times those of HRNet-W48
_MODULES_PER_TENSOR = 4  # many modules have no tensors
_SPARE_TENSORS, _SPARE_VALUES = 1 << 10, 1 << 24  # buffers that are not saved
_DRAWN_VALUES = 1 << 27  # of a decoder that the file lacks: the largest have half of that


@contextlib.contextmanager
def limit_construction(room: Mapping[str, Tensor] | None, *, draw: bool = False) -> Iterator[None]:
    """Stop a constructor that registers far more tensors, or far larger ones, than a file can fill.

    The hooks see a tensor before it is initialized, when its memory is reserved but not yet used.

    Args:
        room: the tensors that will fill the network; None where it holds no memory.
        draw: whether the file may lack a decoder.
    """
    tensors, values = _MOST_TENSORS, None
    if room is not None:
        tensors = 4 * len(room) + _SPARE_TENSORS
        values = 2 * sum(tensor.numel() for tensor in room.values()) + _SPARE_VALUES + (_DRAWN_VALUES if draw else 0)
    left = {"tensors": tensors, "modules": _MODULES_PER_TENSOR * tensors, "values": values}

    def take(what: str, number: int) -> None:
        remaining = left[what]
        if remaining is None:
            return
        left[what] = remaining = remaining - number
        if remaining < 0:
            raise ValueError(f"its config describes a network of far more {what} than the checkpoint can fill")

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        take("tensors", 1)
        take("values", tensor.numel() if tensor is not None else 0)

    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
        register_module_module_registration_hook(lambda *_: take("modules", 1)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
