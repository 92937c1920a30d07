"""Matches the keys of a file to the keys of a model."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PREFIXES = ("module.", "model.", "_orig_mod.", "net.")
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_ddp_module"}
)
"""Names that wrappers of single layers put anywhere into keys: DataParallel, torch.compile, Lightning, FSDP, AC."""
_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """How a model's state dict and a file's tensors pair up."""

    on_disk: Mapping[str, str]
    """Model key -> key on disk, for every pair of equal shape."""
    missing: tuple[str, ...]
    """Model keys that the file lacks. BatchNorm counters that old files never had do not count."""
    unexpected: tuple[str, ...]
    """Keys on disk without a counterpart, under a submodule that the model has."""
    mismatched: tuple[str, ...]
    """Model keys whose tensor on disk has another shape."""
    disk_name: Mapping[str, str]
    """Model key -> key on disk, also for missing ones: the key under which an initialized tensor is written."""
    prefix: str
    """The prefix of wrappers on the keys on disk, such as ``module.``."""
    submodule: str = ""
    """The path of the submodule (ending in a dot) whose own keys the file has: an encoder that was saved by itself."""

    @property
    def complete(self) -> bool:
        """Whether all keys were matched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def to_disk(self, state: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """The tensors of a model's state dict by key on disk."""
        return {disk: state[key] for key, disk in self.disk_name.items()}


def strippings(keys: Iterable[str], known: Iterable[str] = ()) -> list[dict[str, str]]:
    """Ways to read the keys on disk: as they are, then with one more wrapper's prefix gone each, then each of these
    without the names of wrappers further inside, unless the network's own keys (``known``) have such a name.

    A known prefix is stripped when at least half of the keys carry it (a Lightning file also holds its loss), any
    other (the attribute's name in a Lightning module is free) when nine in ten do.
    """
    readings = [{key: key for key in keys}]
    while (prefix := _wrapper(readings[-1])) is not None:
        last = readings[-1]
        readings.append({key.removeprefix(prefix): disk for key, disk in last.items() if key.startswith(prefix)})
    own = {unwrapped(key): key for key in known}
    inside = [{own.get(bare := unwrapped(key), bare): disk for key, disk in names.items()} for names in readings]
    return readings + [
        bare for names, bare in zip(readings, inside, strict=True) if len(bare) == len(names) and bare != names
    ]


def unwrapped(key: str) -> str:
    """A key without the names of wrappers in it."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def prefix_of(reading: Mapping[str, str]) -> str:
    """The prefix that the keys on disk have in a reading; empty where they differ by names further inside."""
    prefixes = {disk.removesuffix(key) for key, disk in reading.items()}
    return prefixes.pop() if len(prefixes) == 1 else ""


def copy_notes(source: str, disk: Collection[str], names: Mapping[str, str]) -> list[str]:
    """A note for the user where keys on disk hold the network once more, such as averages of its weights.

    ``names`` are the network's keys with those on disk that were read.
    """
    found: Counter[str] = Counter()
    for key in set(disk).difference(names.values()):
        parts = key.split(".")
        found.update([".".join(parts[:depth]) for depth in (1, 2) if ".".join(parts[depth:]) in names][:1])
    places = ", ".join(repr(place) for place, count in sorted(found.items()) if 2 * count >= len(names))
    what = "holds the network once more, which is left as it is, under"
    return [f"{PurePath(source).name}: {what} {places}"] if places else []


def _wrapper(keys: Collection[str]) -> str | None:
    counts = Counter(key.partition(".")[0] + "." for key in keys if "." in key)
    for prefix in PREFIXES:
        if counts[prefix] and 2 * counts[prefix] >= len(keys):
            return prefix
    return next((prefix for prefix, count in counts.items() if 10 * count >= 9 * len(keys)), None)


def pair(model: Mapping[str, "torch.Size"], disk: Mapping[str, "torch.Size"]) -> Match:
    """Pair a model's keys with those on disk, under the reading of prefixes that fits best.

    An encoder that was saved by itself is matched to the one submodule whose keys and shapes it has exactly; its
    other keys, such as those of an image classifier, are ignored.
    """

    def affinity(bare: Mapping[str, str]) -> tuple[int, bool]:
        placed = placements(model, {key: disk[name] for key, name in bare.items()})
        return len(bare.keys() & model.keys()), bool(placed)

    reading = max(strippings(disk, model), key=affinity)
    children = {key.partition(".")[0] for key in model}
    prefix = prefix_of(reading)
    places = placements(model, {key: disk[name] for key, name in reading.items()})
    submodule = places[0] if len(places) == 1 else ""
    if submodule:
        reading = {submodule + key if submodule + key in model else key: name for key, name in reading.items()}
        children = set()
    shared = [key for key in model if key in reading]
    return Match(
        on_disk={key: reading[key] for key in shared if model[key] == disk[reading[key]]},
        missing=tuple(key for key in model if key not in reading and not _old_counter(key, reading)),
        unexpected=tuple(
            name for key, name in reading.items() if key not in model and key.partition(".")[0] in children
        ),
        mismatched=tuple(key for key in shared if model[key] != disk[reading[key]]),
        prefix=prefix,
        disk_name={key: reading.get(key, prefix + key) for key in model if not _old_counter(key, reading)},
        submodule=submodule,
    )


def placements(model: Mapping[str, "torch.Size"], disk: Mapping[str, "torch.Size"]) -> list[str]:
    """Paths of submodules (ending in a dot) whose state dict a file holds, among keys that the model lacks."""
    foreign = {key: shape for key, shape in disk.items() if key not in model}
    groups: dict[str, dict[str, torch.Size]] = {}
    for key, shape in model.items() if foreign else ():
        parts = key.split(".")
        for depth in range(1, len(parts)):
            groups.setdefault(".".join(parts[:depth]) + ".", {})[".".join(parts[depth:])] = shape
    return [
        place
        for place, own in groups.items()
        if 2 * len(own) >= len(foreign)  # below half it is chance: a single layer fits in many places
        and not any(place + key in disk for key in own)
        and all(foreign.get(key) == shape or _old_counter(key, foreign) for key, shape in own.items())
    ]


def _old_counter(key: str, reading: Collection[str]) -> bool:
    """Whether a key is a BatchNorm counter that old files lack beside their statistics; torch's loader accepts that."""
    bare = key.removesuffix(_COUNTER)
    return bare != key and key not in reading and f"{bare}.running_mean" in reading
