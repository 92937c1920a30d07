"""`Plan`: what was measured, and the edits to a checkpoint's tensors. Plain numbers and names.

A plan is the receipt saved beside the weights as `equalize.json`: readable, diffable, applicable without data.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from equalize.errors import InputError
from equalize.moments.measured import MeasuredBranch, MeasuredSite
from equalize.sites.refusals import Refusal
from equalize.sites.sites import Site

SCHEMA = 1

SiteStrategy = Literal["migrate", "none", "preserve", "reinit", "rescale"]
Strategy = Literal["auto", "migrate", "preserve", "reinit", "rescale"]

_UNWRITTEN = {"producers", "fixed", "upstream", "norms", "pads_itself"}  # needed only while a plan is made


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSite(MeasuredSite):
    """A measured fusion layer and what was decided for it, see `equalize.plan.strategies`."""

    strategy: SiteStrategy

    @property
    def changes_function(self) -> bool:
        """Whether the layer computes something else afterwards."""
        return self.strategy in CHANGES_FUNCTION


CHANGES_FUNCTION: frozenset[SiteStrategy] = frozenset({"reinit", "rescale"})
MEANING: dict[SiteStrategy, str] = {
    "none": "left alone, for nothing is to be gained; the network computes and trains as before",
    "migrate": "scale moved from the branches into the fusion weights; the network computes the same",
    "preserve": "nothing changes on disk; in training, equalize.attach shows the optimizer branches of scale 1",
    "rescale": "fusion weights divided by each sigma: they act on branches of scale 1",
    "reinit": "fusion weights drawn anew, then divided by each sigma: they act on branches of scale 1",
}
"""What each strategy does, for reports."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sites with their measured branches, and the edits that embed scale equalization.

    Attributes:
        strategy: as given; each site has its own. "none" where `auto` left all of them alone.
        seed: of drawn weights.
        keep_norm: whether equalized weights were rescaled to the norm they had.
        sites: the measured ones; those of strategy "none" were left alone. refusals: what could not be, and why.
        edits: the changes to the checkpoint, in order.
        facts: provenance and results, as they stand in `equalize.json`.
    """

    strategy: Strategy | SiteStrategy
    seed: int = 0
    keep_norm: bool = False
    sites: tuple[PlannedSite, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    edits: tuple[Edit, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def equalized(self) -> tuple[PlannedSite, ...]:
        """The sites that were not left alone."""
        return tuple(site for site in self.sites if site.strategy != "none")

    @property
    def changed(self) -> tuple[str, ...]:
        """State-dict keys of the tensors that the plan changes."""
        return tuple(dict.fromkeys(key for edit in self.edits for key in (edit.tensor, *edit.aliases)))

    def scaled_inputs(self, site: PlannedSite) -> dict[int, float]:
        """The factors that the plan multiplies a site's fusion weights by, by the first channel of each branch."""
        edits = [edit for edit in self.edits if isinstance(edit, ScaleInputs) and edit.tensor == site.weight]
        return {edit.start: edit.factor for edit in edits}

    def input_scale(self, site: PlannedSite) -> tuple[float, ...]:
        """The factor by which the plan divides each branch of a site and multiplies its weights (`migrate`), else 1."""
        factors = self.scaled_inputs(site) if site.strategy == "migrate" else {}
        return tuple(factors.get(branch.start, 1.0) for branch in site.branches)

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
            "edits": [_edit_json(edit) for edit in self.edits],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: object = "plan") -> Self:
        """Reads what `to_json` wrote; an InputError if `content` is no plan, or of another schema."""
        if content.get("schema") != SCHEMA:
            got = f"schema {content.get('schema')}"
            raise InputError(where, "is no plan of this version", got=got, expected=SCHEMA)
        try:
            return cls(
                strategy=content["strategy"],
                seed=int(content["seed"]),
                keep_norm=bool(content.get("keep_norm", False)),
                sites=tuple(_site(each) for each in content["sites"]),
                refusals=tuple(Refusal(**each) for each in content["refusals"]),
                edits=tuple(_edit(each) for each in content["edits"]),
                facts={key: value for key, value in content.items() if key not in _DERIVED},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"is no plan ({type(error).__name__}: {error})"
            raise InputError(where, what, remedy="use an equalize.json") from error

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
    """A site as it stands in JSON: found, measured or planned, with what is known of it then."""
    content = asdict(site)
    return _lists(content) | {"branches": [_lists(branch) for branch in content["branches"]]}


def _site(content: Mapping[str, Any]) -> PlannedSite:
    branches = tuple(MeasuredBranch(**_tuples(branch)) for branch in content["branches"])
    if not branches or content["strategy"] not in get_args(SiteStrategy):
        raise ValueError(f"{content['layer']} has no branches or an unknown strategy")
    return PlannedSite(**(_tuples(content) | {"branches": branches}))


def _edit_json(edit: Edit) -> dict[str, Any]:
    content = {each.name: getattr(edit, each.name) for each in fields(edit)}
    given = {key: value for key, value in content.items() if value != () and (key, value) != ("groups", 1)}
    return {"tensor": edit.tensor, "action": edit.action, **_lists(given)}


def _edit(content: Mapping[str, Any]) -> Edit:
    kinds: dict[str, type[Edit]] = {kind.action: kind for kind in (Draw, Scale, Add, Set)}
    values = _tuples(content)
    kind = kinds[values.pop("action")]
    edit = (ScaleInputs if kind is Scale and "axis" in values else kind)(**values)
    if isinstance(edit, Scale | ScaleInputs) and not math.isfinite(edit.factor):
        raise ValueError(f"{edit.tensor} has a factor that is not finite")
    if isinstance(edit, ScaleInputs) and not 0 <= edit.start < edit.stop:
        raise ValueError(f"{edit.tensor} has a range {edit.start}..{edit.stop}")
    return edit


def _lists(content: Mapping[str, Any]) -> dict[str, Any]:
    written = {key: value for key, value in content.items() if key not in _UNWRITTEN}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in written.items()}


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
