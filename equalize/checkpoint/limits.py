"""Limits the size of a network that a checkpoint describes to about that of its weights.

A few bytes of a config can describe a million layers, or one as large as all memory. Only networks that a checkpoint
describes are limited, by the tensors it holds and not by depth; networks that users name are not.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

_MOST_TENSORS = 1 << 14  # for a config without weights: eight times those of HRNet-W48
_SPARE_TENSORS, _SPARE_VALUES = 1 << 10, 1 << 24  # for buffers that are not saved
_DRAWN_VALUES = 1 << 27  # for a decoder that the file lacks: the largest have half of that


@contextlib.contextmanager
def limit_construction(room: Mapping[str, Tensor] | None, *, draw: bool = False) -> Iterator[None]:
    """Stop a constructor that registers far more tensors, or far larger ones, than a file can fill.

    The hooks see a tensor before it is initialized, when its memory is reserved but not yet used. ``room`` are the
    tensors that will fill the network, None where it holds no memory; ``draw``: the file may lack a decoder.
    """
    tensors: float = _MOST_TENSORS
    values: float = math.inf
    if room is not None:
        tensors = 4 * len(room) + _SPARE_TENSORS
        values = 2 * sum(tensor.numel() for tensor in room.values()) + _SPARE_VALUES + (_DRAWN_VALUES if draw else 0)

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, values
        tensors -= 1
        values -= 0 if tensor is None else tensor.numel()
        if tensors < 0 or values < 0:
            what = "tensors" if tensors < 0 else "values"
            raise ValueError(f"its config describes a network of far more {what} than the checkpoint can fill")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
