"""A state dict that nobody named -> the library and arguments that its keys and shapes determine."""

from collections.abc import Mapping

import torch

from equalize.checkpoint.families.smp import keys as smp_keys
from equalize.checkpoint.families.torchvision import family as torchvision_family

__all__ = ["recognise"]


def recognise(
    shapes: Mapping[str, torch.Size], where: object, *, init_missing: bool
) -> tuple[str, dict[str, object], tuple[str, ...]]:
    """The ``--arch`` and ``--arch-arg`` that a state dict belongs to, and notes on what its shapes leave open.

    Args:
        shapes: key -> shape, as they lie on disk.
        where: the file, for errors.
        init_missing: also accept the only network that the keys are a part of.

    Raises:
        CheckpointError: none fits, or several do; names them and the flag that decides.
        ResourceError: the library that it belongs to is not installed.
    """
    if smp_keys.looks_like_smp(shapes):
        name, arguments, notes = smp_keys.recognise(shapes, where)
        return f"smp:{name}", arguments, notes
    name, arguments = torchvision_family.recognise(shapes, where, init_missing=init_missing)
    return f"torchvision:{name}", arguments, ()
