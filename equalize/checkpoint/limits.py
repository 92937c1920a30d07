"""How large a network may be that a checkpoint describes: about as large as what it holds to fill it.

A few bytes of a config can ask for a million layers, or for one as large as all memory. Only what a checkpoint says of
itself is bounded here; networks that users name themselves are theirs to size.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from equalize.errors import CheckpointError

__all__ = ["bounded", "check_counts"]

_MOST_TENSORS, _MOST_MODULES = 1 << 12, 1 << 14  # HRNet-W48 has 2,000 tensors in 1,600 modules
_SPARE_TENSORS, _SPARE_VALUES = 1 << 10, 1 << 24  # buffers that are not saved
_DRAWN_VALUES = 1 << 27  # of a decoder that the file lacks: the largest have half of that
_MOST = {"num_labels": 100_000, "pool_scales": 64, "window_size": 48}
"""By part of a key. The square of a window, and its square again, and that of a pooling are made without weights."""
_MOST_LAYERS = 90  # 76 in a MaskFormer over ResNet-152, some counted twice; tracing one takes up to 0.1 s
_LONGEST_LIST = 1000


@contextlib.contextmanager
def bounded(room: Mapping[str, Tensor] | None, *, draw: bool = False) -> Iterator[None]:
    """Stop a constructor that registers far more tensors, or far larger ones, than a file can fill.

    The hooks see a tensor before it is initialised, when its memory is promised but not yet used.

    Args:
        room: the tensors that will fill the network; None where it holds no memory.
        draw: whether the file may lack a decoder.
    """
    tensors, values = _MOST_TENSORS, None
    if room is not None:
        tensors = min(tensors, 4 * len(room) + _SPARE_TENSORS)
        values = 2 * sum(tensor.numel() for tensor in room.values()) + _SPARE_VALUES + (_DRAWN_VALUES if draw else 0)
    left = {"tensors": tensors, "modules": _MOST_MODULES, "values": values}

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


def check_counts(where: object, config: Any, layers: Sequence[str] = ("layers", "depth", "blocks")) -> None:
    """Refuse numbers of labels, layers and pixels that no network has.

    Args:
        where: for errors.
        config: numbers by key, nested.
        layers: parts of keys that speak of layers.

    Raises:
        CheckpointError: there is one.
    """
    together = 0
    for key, value in _numbers(where, config):
        for part, most in _MOST.items():
            if part in key and value > most:
                raise CheckpointError(where, f"asks for {key} = {value}", expected=f"at most {most}")
        if any(part in key for part in layers):
            together += max(0, value)
            if together > _MOST_LAYERS:
                raise CheckpointError(where, f"asks for {key} = {value}", expected=f"at most {_MOST_LAYERS} in all")


def _numbers(where: object, config: Any) -> Iterator[tuple[str, int]]:
    """Every whole number of a config by its key."""
    stack = [("", config)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, Mapping):
            stack += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            if len(value) > _LONGEST_LIST:
                raise CheckpointError(
                    where, f"has a list of {len(value)} under {key!r}", expected=f"at most {_LONGEST_LIST}"
                )
            stack += [(key, inner) for inner in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value
