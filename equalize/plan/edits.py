"""The edits of a plan: one change to one tensor each. Plain numbers and names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change to one tensor of a checkpoint, by its state-dict key; `aliases` are its other keys, if any."""

    action: ClassVar[str]

    tensor: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw(Edit):
    """Calls the layer's own `reset_parameters` under `seed`, which draws its bias as well."""

    action: ClassVar[str] = "draw"

    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Edit):
    """Multiplies the whole tensor by `factor`."""

    action: ClassVar[str] = "scale"

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleInputs(Edit):
    """Multiplies what reads a layer's input channels `start` to `stop`, on `axis` and in `groups`, by `factor`."""

    action: ClassVar[str] = "scale"

    axis: int
    start: int
    stop: int
    groups: int = 1
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Add(Edit):
    """Adds `values`, one for each element."""

    action: ClassVar[str] = "add"

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Set(Edit):
    """Replaces the tensor by `values`, one for each element."""

    action: ClassVar[str] = "set"

    values: tuple[float, ...]


def edit_json(edit: Edit) -> dict[str, Any]:
    """An edit as it stands in JSON."""
    content = {each.name: getattr(edit, each.name) for each in fields(edit)}
    given = {key: value for key, value in content.items() if value != () and (key, value) != ("groups", 1)}
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    return {"tensor": edit.tensor, "action": edit.action, **lists}


def read_edit(content: Mapping[str, Any]) -> Edit:
    """Reads what `edit_json` wrote; a KeyError, TypeError or ValueError if it is something else."""
    kinds: dict[str, type[Edit]] = {kind.action: kind for kind in (Draw, Scale, Add, Set)}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    kind = kinds[values.pop("action")]
    edit = (ScaleInputs if kind is Scale and "axis" in values else kind)(**values)
    if isinstance(edit, Scale | ScaleInputs) and not 0 < edit.factor < math.inf:
        raise ValueError(f"{edit.tensor} has a factor {edit.factor}")
    if isinstance(edit, Add | Set) and not all(math.isfinite(value) for value in edit.values):
        raise ValueError(f"{edit.tensor} has values that are not finite")
    if isinstance(edit, ScaleInputs) and not (0 <= edit.start < edit.stop and edit.axis in (0, 1) and edit.groups > 0):
        raise ValueError(
            f"{edit.tensor} has a range {edit.start}..{edit.stop} of axis {edit.axis}, {edit.groups} groups"
        )
    return edit
