"""A backbone of transformers that was saved by itself, brought to the place that it has in a network around it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equalize.checkpoint.families.transformers.loader import revert, skeleton
from equalize.checkpoint.files.weights import Weights
from equalize.checkpoint.keys import strippings

__all__ = ["place_backbone"]

Shapes = Mapping[str, torch.Size]


def place_backbone(
    config: Any, weights: Weights, name: str, where: Path, *, state_dict: bool
) -> tuple[Weights, tuple[str, ...]]:
    """Weights by the keys that the network of a config has for them, and a note where they are others.

    transformers itself finds a base model in a directory, as SegFormer's in ``nvidia/mit-b0``; it does not find what
    UPerNet and its like are built around.

    Args:
        config: of the network around.
        weights: as read.
        name: of the file or directory, for the note.
        where: the config lies, for errors.
        state_dict: whether users may load the file without transformers' own loader.
    """
    model = skeleton(config, where)
    namings = _namings(model)
    prefix = "" if state_dict else f"{getattr(model, 'base_model_prefix', '')}."
    known = {name for shapes in namings for key in shapes for name in (key, key.removeprefix(prefix))}
    readings = strippings(weights.tensors)
    if any(2 * len(reading.keys() & known) >= len(reading) for reading in readings):
        return weights, ()
    found = [
        (place, _under(place, shapes, weights, readings))
        for shapes in namings
        for place in sorted({".".join(key.split(".")[:depth]) + "." for key in shapes for depth in (1, 2)})
    ]
    place, names = max(found, key=lambda each: len(each[1]))
    if 2 * len(names) < len(weights.tensors):
        return weights, ()
    note = f"{name}: {len(names)} tensors were taken as those of {place.removesuffix('.')}"
    return weights.under(names), (note,)


def _namings(model: nn.Module) -> list[Shapes]:
    """Key -> shape by the keys of the modules, and by those that transformers writes; it reads both, but not mixed."""
    own = model.state_dict()
    return [{key: value.shape for key, value in state.items()} for state in (own, revert(model, own, as_loaded=False))]


def _under(place: str, shapes: Shapes, weights: Weights, readings: list[dict[str, str]]) -> dict[str, str]:
    """Key on disk -> key under a place; empty where a part of what is put there would not fit.

    A wrapper's name may go with some keys and not with others: networks of transformers differ in this.
    """
    names: dict[str, str] = {}
    for reading in readings:
        for key, disk in reading.items():
            if shapes.get(place + key) == weights.tensors[disk].shape:
                names[disk] = place + key
    parts = {key.partition(".")[0] for key in names}
    left = [key for key in weights.tensors if key not in names and key.partition(".")[0] in parts]
    fits = len(set(names.values())) == len(names)
    # Old files hold tables of positions, which are computed today.
    return names if fits and not any(weights.tensors[key].is_floating_point() for key in left) else {}
