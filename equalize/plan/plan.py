"""`Plan`: what was measured, and the edits to a checkpoint's tensors. Plain numbers and names.

A plan is the receipt saved beside the weights as `equalize.json`: readable, diffable, applicable without data.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from equalize.errors import InputError
from equalize.moments.measured import MeasuredBranch, MeasuredSite, sigma_rms
from equalize.plan.edits import Edit, ScaleInputs, edit_json, read_edit
from equalize.sites.refusals import Refusal
from equalize.sites.sites import Site

SCHEMA = 1

SiteStrategy = Literal["migrate", "none", "preserve", "reinit", "rescale"]
Strategy = Literal["auto", "migrate", "preserve", "reinit", "rescale"]
ScaleTo = Literal["step", "paper"]

# Needed only while a plan is made.
_UNWRITTEN = {"producers", "readers", "fixed", "tensor", "upstream", "norms", "pads_itself"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSite(MeasuredSite):
    """A measured fusion layer and what was decided for it, see `equalize.plan.strategies`.

    Attributes:
        strategy: how its branches are equalized.
        tau: the scale that they are equalized to.
    """

    strategy: SiteStrategy
    tau: float

    @property
    def changes_function(self) -> bool:
        """Whether the layer computes something else afterwards."""
        return self.strategy in CHANGES_FUNCTION


CHANGES_FUNCTION: frozenset[SiteStrategy] = frozenset({"reinit", "rescale"})
MEANING: dict[SiteStrategy, str] = {
    "none": "left alone, for nothing is to be gained; the network computes and trains as before",
    "migrate": "scale moved from the branches into the fusion weights; the network computes the same",
    "preserve": "nothing changes on disk; in training, the optimizer trains the equalized weights",
    "rescale": "fusion weights times tau/sigma of each branch: they act on branches of one scale",
    "reinit": "fusion weights drawn anew, then times tau/sigma of each branch: they act on branches of one scale",
}
"""What each strategy does, for reports."""


def target_scale(site: MeasuredSite, scale: ScaleTo) -> float:
    """What the branches of a site are equalized to: "step": sigma_rms, which keeps the size of a step; "paper": 1."""
    return sigma_rms(site.branches) if scale == "step" else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sites with their measured branches, and the edits that embed scale equalization.

    Attributes:
        strategy: as given; each site has its own. "none" where `auto` left all of them alone.
        seed: of drawn weights.
        scale: what the branches are equalized to, see `target_scale`.
        sites: the measured ones; those of strategy "none" were left alone. refusals: what could not be, and why.
        edits: the changes to the checkpoint, in order.
        disk_keys: keys in the files of those tensors that the model, whose keys the edits have, calls otherwise.
        facts: provenance and results, as they stand in `equalize.json`.
    """

    strategy: Strategy | SiteStrategy
    seed: int = 0
    scale: ScaleTo = "step"
    sites: tuple[PlannedSite, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    edits: tuple[Edit, ...] = ()
    disk_keys: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def equalized(self) -> tuple[PlannedSite, ...]:
        """The sites that were not left alone."""
        return tuple(site for site in self.sites if site.strategy != "none")

    @property
    def changed(self) -> tuple[str, ...]:
        """State-dict keys of the tensors that the plan changes."""
        return tuple(dict.fromkeys(key for edit in self.edits for key in (edit.tensor, *edit.aliases)))

    @property
    def changed_on_disk(self) -> tuple[str, ...]:
        """The same as they stand in the files."""
        return tuple(self.disk_keys.get(key, key) for key in self.changed)

    def scaled_inputs(self, site: PlannedSite) -> dict[int, float]:
        """The factors that the plan multiplies a site's fusion weights by, by the first channel of each branch."""
        edits = [edit for edit in self.edits if isinstance(edit, ScaleInputs) and edit.tensor == site.weight]
        return {edit.start: edit.factor for edit in edits}

    def input_scale(self, site: PlannedSite) -> tuple[float, ...]:
        """The factor by which the plan divides each branch of a site and multiplies its weights, 1 for most.

        Others than `migrate` have some where another layer that reads the branch moved it.
        """
        factors = {} if site.changes_function else self.scaled_inputs(site)
        return tuple(factors.get(branch.start, 1.0) for branch in site.branches)

    def to_json(self) -> dict[str, Any]:
        """The content of `equalize.json`."""
        return {
            "schema": SCHEMA,
            **self.facts,
            "strategy": self.strategy,
            "seed": self.seed,
            "scale": self.scale,
            "sites": [site_json(site) for site in self.sites],
            "refusals": [refusal.to_json() for refusal in self.refusals],
            "changed": list(self.changed_on_disk),
            **({"model_keys": {disk: key for key, disk in self.disk_keys.items()}} if self.disk_keys else {}),
            "edits": [edit_json(edit) for edit in self.edits],
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
                scale=_scale(content),
                sites=tuple(_site({"tau": _old_tau(each, content)} | each) for each in content["sites"]),
                refusals=tuple(Refusal(**each) for each in content["refusals"]),
                edits=tuple(read_edit(each) for each in content["edits"]),
                disk_keys={key: disk for disk, key in content.get("model_keys", {}).items()},
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


_DERIVED = {"schema", "strategy", "seed", "scale", "sites", "refusals", "changed", "model_keys", "edits"}


def site_json(site: Site) -> dict[str, Any]:
    """A site as it stands in JSON: found, measured or planned, with what is known of it then."""
    content = asdict(site)
    return _lists(content) | {"branches": [_lists(branch) for branch in content["branches"]]}


def _scale(content: Mapping[str, Any]) -> ScaleTo:
    """The paper's where a plan does not say: it is older than the choice."""
    scale: ScaleTo = content.get("scale", "paper")
    if scale not in get_args(ScaleTo):
        raise ValueError(f"unknown scale {scale!r}")
    return scale


def _old_tau(site: Mapping[str, Any], plan: Mapping[str, Any]) -> float:
    """The tau of a site of a plan that is older than it: 1, or the factor that kept the weight's norm."""
    if plan.get("keep_norm") and site["strategy"] in CHANGES_FUNCTION:
        factors = (
            edit["factor"] for edit in plan["edits"] if (edit["tensor"], edit.get("start")) == (site["weight"], 0)
        )
        return float(next(factors, 1.0) * site["branches"][0]["std"])
    return 1.0


def _site(content: Mapping[str, Any]) -> PlannedSite:
    branches = tuple(MeasuredBranch(**_tuples(branch)) for branch in content["branches"])
    if not branches or content["strategy"] not in get_args(SiteStrategy):
        raise ValueError(f"{content['layer']} has no branches or an unknown strategy")
    shift = "bias" if content["shift"] == "bias" else None  # older plans: into a norm's mean, which takes it out anyway
    site = PlannedSite(**(_tuples(content) | {"branches": branches, "shift": shift}))
    bounds = [0, *(branch.stop for branch in branches)]
    holds = {
        "names": all(isinstance(each, str) for each in (site.layer, site.weight, site.op, site.bias or "")),
        "axis and sizes": site.axis in (0, 1)
        and all(type(each) is int and each > 0 for each in (site.groups, *site.kernel, *bounds[1:])),
        "branches": [branch.start for branch in branches] == bounds[:-1] and bounds == sorted(set(bounds)),
        "scales": all(0 < each < math.inf for each in (site.tau, *(branch.std for branch in branches))),
        "means": all(math.isfinite(branch.mean) for branch in branches),
    }
    for what, right in holds.items():
        if not right:
            raise ValueError(f"{site.layer} has {what} that no fusion layer has")
    return site


def _lists(content: Mapping[str, Any]) -> dict[str, Any]:
    written = {key: value for key, value in content.items() if key not in _UNWRITTEN}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in written.items()}


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
