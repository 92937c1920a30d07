"""A backbone of transformers that was saved by itself, brought to the place that it has in a network around it."""

from collections.abc import Mapping

from torch import Tensor, nn

from equalize.checkpoint.families.transformers.loader import revert
from equalize.checkpoint.files.weights import Weights
from equalize.checkpoint.keys import strippings


def place_backbone(model: nn.Module, weights: Weights, name: str) -> tuple[Weights, tuple[str, ...]]:
    """Weights by the keys that a network has for them, and a note where they are others.

    transformers itself finds a base model in a directory, as SegFormer's in ``nvidia/mit-b0``; it does not find what
    UPerNet and its like are built around.
    """
    own = model.state_dict()
    # By the keys of the modules, and by those that transformers writes; it reads both, but not mixed.
    states = (own, revert(model, own, as_loaded=False))
    readings = strippings(weights.tensors)
    if any(2 * len(reading.keys() & (states[0].keys() | states[1].keys())) >= len(reading) for reading in readings):
        return weights, ()
    found = [
        (place, _under(place, state, weights, readings))
        for state in states
        for place in sorted({".".join(key.split(".")[:depth]) + "." for key in state for depth in (1, 2)})
    ]
    place, names = max(found, key=lambda each: len(each[1]))
    if 2 * len(names) < len(weights.tensors):
        return weights, ()
    note = f"{name}: {len(names)} tensors were taken as those of {place.removesuffix('.')}"
    return weights.under(names), (note,)


def _under(place: str, state: Mapping[str, Tensor], weights: Weights, readings: list[dict[str, str]]) -> dict[str, str]:
    """Key on disk -> key under a place; empty where a part of what is put there would not fit.

    A wrapper's name may go with some keys and not with others: networks of transformers differ in this.
    """
    names: dict[str, str] = {}
    for reading in readings:
        for key, disk in reading.items():
            if place + key in state and state[place + key].shape == weights.tensors[disk].shape:
                names[disk] = place + key
    parts = {key.partition(".")[0] for key in names}
    left = [key for key in weights.tensors if key not in names and key.partition(".")[0] in parts]
    fits = len(set(names.values())) == len(names)
    # Old files hold tables of positions, which are computed today.
    return names if fits and not any(weights.tensors[key].is_floating_point() for key in left) else {}
