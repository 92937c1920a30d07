"""Copies a file's tensors into a model, strictly: a tensor that does not fit is an error, also a missing one unless
``init_missing`` leaves it as initialized."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from equalize.checkpoint.files.weights import Weights
from equalize.checkpoint.keys import PREFIXES, Match, copy_notes, pair, placements
from equalize.checkpoint.request import Request
from equalize.errors import CheckpointError, NumericsError
from equalize.messages import first_of


def fit(
    model: nn.Module, tensors: Mapping[str, Tensor], request: Request, *, num_classes: int | None, architecture: str
) -> Match:
    """Pair a model with tensors strictly; with ``init_missing`` some may be missing, or be of another class count.

    A CheckpointError for any other key that is missing, left over or of another shape.
    """
    shapes = {key: value.shape for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    stored = {key: tensor.shape for key, tensor in tensors.items()}
    match = pair(shapes, stored)
    if match.complete:
        return match
    where, drawn = request.source, request.init_missing
    if not match.on_disk:
        if places := placements(shapes, stored):
            what = f"fits several parts of {architecture}: {' and '.join(place[:-1] for place in places)}"
            raise CheckpointError(where, what, remedy="put the name of one before its keys")
        what, got = f"has no key in common with {architecture}", ", ".join(list(tensors)[:3])
        raise CheckpointError(where, what, got=got, remedy="check --arch and --arch-arg")
    classifier = {key: (shapes[key], tensors[match.disk_name[key]].shape) for key in match.mismatched}
    if match.unexpected or not (drawn and only_class_count(classifier, num_classes)):
        raise mismatch_error(where, architecture, match.missing, match.unexpected, classifier, init_missing=drawn)
    return match


def fill(model: nn.Module, weights: Weights, match: Match, where: object) -> tuple[str, ...]:
    """Copy the paired tensors into the model; returns the keys that keep their initialization.

    A NumericsError if a tensor holds NaN or Inf.
    """
    check_finite({disk: weights.tensors[disk] for disk in match.on_disk.values()}, where)
    found = {key: weights.tensors[disk] for key, disk in match.on_disk.items()}
    nn.Module.load_state_dict(model, found, strict=False)
    left = {*match.missing, *match.mismatched}
    return tuple(key for key in model.state_dict() if key in left)


def only_class_count(mismatched: Mapping[str, tuple[torch.Size, torch.Size]], num_classes: int | None) -> bool:
    """Whether shapes differ as those of a classifier with other classes do: along the first axis alone.

    ``mismatched`` is key -> (shape in the model, shape on disk); for ``num_classes`` N, N + 1 counts too ("nothing").
    """
    if not mismatched:
        return True
    if any(len(a) != len(b) or not a or a[1:] != b[1:] for a, b in mismatched.values()):
        return False
    outputs = {model[0] for model, _ in mismatched.values()}
    count = min(outputs) if num_classes is None else num_classes
    return outputs <= {count, count + 1}


def mismatch_error(
    where: object,
    architecture: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Mapping[str, tuple[torch.Size, torch.Size]],
    *,
    init_missing: bool = False,
) -> CheckpointError:
    """The error for keys that do not pair up: how many of each kind, and the first three."""
    shapes = [f"{key} {tuple(disk)} for {tuple(model)}" for key, (model, disk) in mismatched.items()]
    kinds = {"missing": list(missing), "unexpected": list(unexpected), "of another shape": shapes}
    facts = [f"{len(keys)} {kind} ({first_of(keys)})" for kind, keys in kinds.items() if keys]
    remedy = "check --arch and --arch-arg"
    if not init_missing and not kinds["unexpected"] and only_class_count(mismatched, None):
        remedy = "--init-missing --num-classes N draws what is missing" + (
            " and a new classifier" if mismatched else ""
        )
    return CheckpointError(where, f"does not fit {architecture}: keys " + ", ".join(facts), remedy=remedy)


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Stop at the first tensor with NaN or Inf, by a NumericsError with its name."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and (broken := int((~torch.isfinite(tensor)).sum())):
            raise NumericsError(where, f"tensor {key!r} holds {broken} NaN or Inf", got=f"shape {tuple(tensor.shape)}")


def with_model_keys(weights: Weights, match: Match, *, drop_prefix: bool = False) -> tuple[Weights, Match]:
    """Weights of a part of a network, renamed to the network's keys, so that its library loads what is written.

    Keys beside an encoder's, such as those of an image classifier, are dropped. ``drop_prefix`` renames also where
    the keys differ by a wrapper's prefix alone.
    """
    if not match.missing or not (match.submodule or (drop_prefix and match.prefix)):
        return weights, match
    names = {disk: key for key, disk in match.disk_name.items() if disk in weights.tensors}
    others = {} if match.submodule else {key: key for key in weights.tensors}
    own = {key: key for key in match.disk_name}
    here = replace(match, on_disk={key: key for key in match.on_disk}, disk_name=own, prefix="", submodule="")
    return weights.under({**others, **names}), here


def placement_notes(source: str, weights: Weights, match: Match) -> list[str]:
    """Notes for the user on how keys were matched."""
    name, notes = Path(source).name, []
    if any(f"{part}." not in PREFIXES for part in match.prefix.split(".")[:-1]):
        notes.append(f"{name}: the network was taken to be what lies under {match.prefix.removesuffix('.')!r}")
    if match.submodule:
        found = sum(key.startswith(match.submodule) for key in match.on_disk)
        notes.append(f"{name}: {found} tensors were taken as those of {match.submodule.removesuffix('.')}")
    left = sorted(set(weights.tensors) - set(match.disk_name.values())) if match.submodule and match.missing else []
    if left:
        notes.append(f"{name}: left out, as no part of the network: {first_of(left)}")
    return notes + copy_notes(source, weights.tensors, match.disk_name)
