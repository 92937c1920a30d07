"""An encoder that was saved by itself, brought to the place that it has in a network."""

from dataclasses import replace
from pathlib import Path

from equalize.checkpoint.files.weights import Weights
from equalize.checkpoint.keys import PREFIXES, Match

__all__ = ["placement_notes", "settled"]


def settled(weights: Weights, match: Match, *, own_keys: bool = False) -> tuple[Weights, Match]:
    """Weights that lack a part of a network, by the keys that the network has: so its library loads what is written.

    What the file of an encoder holds beside the encoder, such as an image classifier, is left out.

    Args:
        weights: as read.
        match: how they pair up.
        own_keys: also where only a wrapper's prefix is in the way.
    """
    if not match.missing or not (match.submodule or (own_keys and match.prefix)):
        return weights, match
    names = {disk: key for key, disk in match.disk_name.items() if disk in weights.tensors}
    others = {} if match.submodule else {key: key for key in weights.tensors}
    own = {key: key for key in match.disk_name}
    here = replace(match, on_disk={key: key for key in match.on_disk}, disk_name=own, prefix="", submodule="")
    return weights.under({**others, **names}), here


def placement_notes(path: Path, weights: Weights, match: Match) -> list[str]:
    """What was taken to be what, for the user."""
    notes = []
    if any(f"{part}." not in PREFIXES for part in match.prefix.split(".")[:-1]):
        notes.append(f"{path.name}: the network was taken to be what lies under {match.prefix.removesuffix('.')!r}")
    if match.submodule:
        found = sum(key.startswith(match.submodule) for key in match.on_disk)
        notes.append(f"{path.name}: {found} tensors were taken as those of {match.submodule.removesuffix('.')}")
    left = sorted(set(weights.tensors) - set(match.disk_name.values())) if match.submodule and match.missing else []
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        notes.append(f"{path.name}: left out, as no part of the network: {', '.join(left[:3])}{more}")
    return notes
