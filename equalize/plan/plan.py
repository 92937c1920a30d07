"""The plan: what was measured and which tensors of a checkpoint it changes how. Plain numbers and names.

A plan is the receipt saved beside the weights as `equalize.json`: readable, diffable, replayable without data.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from equalize.errors import InputError
from equalize.sites.branches import Branch
from equalize.sites.sites import Refusal, Site

__all__ = ["SCHEMA", "Edit", "Plan", "Strategy", "site_json"]

SCHEMA = 1

Strategy = Literal["auto", "migrate", "preserve", "reinit", "rescale"]

_UNWRITTEN = {"producers", "fixed", "upstream", "norms", "pads_itself"}  # of use while a plan is made, not after


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change to one tensor of a checkpoint. Edits are carried out in order.

    Attributes:
        tensor: state-dict key.
        action: "draw" calls the layer's own `reset_parameters` under `seed`, which draws its bias as well;
            "scale" multiplies by `factor`; "add" adds `values`; "set" replaces by `values`.
        axis, start, stop: the part that is scaled, in the layer's input channels; the whole tensor if None.
        groups: of a grouped or depthwise convolution; what its input channels are found by.
        aliases: the same tensor's other state-dict keys, where a network has it under several.
    """

    tensor: str
    action: Literal["draw", "scale", "add", "set"]
    axis: int | None = None
    start: int | None = None
    stop: int | None = None
    groups: int = 1
    factor: float | None = None
    values: tuple[float, ...] | None = None
    seed: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sites with their measured branches, and the edits that embed scale equalization.

    Attributes:
        strategy: as asked for; each site says what it got.
        seed: of drawn weights.
        keep_norm: whether equalized weights were rescaled to the norm they had.
        sites: the equalized ones. refusals: what could not be, and why.
        edits: the changes to the checkpoint, in order.
        facts: provenance and results, as they stand in `equalize.json`.
    """

    strategy: Strategy
    seed: int = 0
    keep_norm: bool = False
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    edits: tuple[Edit, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> tuple[str, ...]:
        """State-dict keys of the tensors that the plan changes."""
        return tuple(dict.fromkeys(key for edit in self.edits for key in (edit.tensor, *edit.aliases)))

    def input_scale(self, site: Site) -> tuple[float, ...]:
        """By what the plan divides each branch of a site: its fusion weights grow by as much (`migrate`), else 1."""
        if site.strategy != "migrate":
            return (1.0,) * len(site.branches)
        factors = {
            edit.start: edit.factor for edit in self.edits if edit.tensor == site.weight and edit.start is not None
        }
        return tuple(factors.get(branch.start) or 1.0 for branch in site.branches)

    def to_json(self) -> dict[str, Any]:
        """The content of `equalize.json`."""
        return {
            "schema": SCHEMA,
            **self.facts,
            "strategy": self.strategy,
            "seed": self.seed,
            "keep_norm": self.keep_norm,
            "sites": [site_json(site) for site in self.sites],
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "changed": list(self.changed),
            "edits": [_without_defaults(edit) for edit in self.edits],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: object = "plan") -> Self:
        """Reads what `to_json` wrote.

        Raises:
            InputError: if `content` is no plan, or of another schema.
        """
        if content.get("schema") != SCHEMA:
            raise InputError(
                where, "is no plan of this version", got=f"schema {content.get('schema')}", expected=SCHEMA
            )
        try:
            return cls(
                strategy=content["strategy"],
                seed=int(content["seed"]),
                keep_norm=bool(content.get("keep_norm", False)),
                sites=tuple(_site(each) for each in content["sites"]),
                refusals=tuple(Refusal(**each) for each in content["refusals"]),
                edits=tuple(Edit(**_tuples(each)) for each in content["edits"]),
                facts={key: value for key, value in content.items() if key not in _DERIVED},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                where, f"is no plan ({type(error).__name__}: {error})", remedy="use an equalize.json"
            ) from error

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads a plan from `equalize.json`, or from a directory that holds one."""
        path = Path(path)
        path = path / "equalize.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(path, "does not exist", remedy="give an equalize.json or a directory with one") from error
        except (OSError, ValueError) as error:
            raise InputError(path, f"cannot be read as JSON ({error})", remedy="give an equalize.json") from error
        return cls.from_json(content if isinstance(content, dict) else {}, path)


_DERIVED = {"schema", "strategy", "seed", "keep_norm", "sites", "refusals", "changed", "edits"}


def site_json(site: Site) -> dict[str, Any]:
    """A site as it stands in JSON; measured values and the strategy only once they are known."""
    content = {key: value for key, value in asdict(site).items() if key not in _UNWRITTEN}
    content["kernel"] = list(site.kernel)
    if site.strategy is None:
        del content["strategy"]
    content["branches"] = [_branch_json(branch) for branch in site.branches]
    return content


def _branch_json(branch: Branch) -> dict[str, Any]:
    measured = {"count", "mean", "std", "ci95"}
    content = {key: value for key, value in asdict(branch).items() if key not in _UNWRITTEN}
    content["factor"] = list(branch.factor)
    return {key: value for key, value in content.items() if branch.count is not None or key not in measured}


def _site(content: Mapping[str, Any]) -> Site:
    branches = tuple(Branch(**_tuples(branch)) for branch in content["branches"])
    return Site(**(_tuples(content) | {"branches": branches}))


def _without_defaults(edit: Edit) -> dict[str, Any]:
    content = {each.name: getattr(edit, each.name) for each in fields(edit)}
    kept = {key: value for key, value in content.items() if value not in (None, ()) and (key, value) != ("groups", 1)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in content.items()
    }
