"""Chooses the strategy of each site and computes the edits of a plan from the moments.

strategy   fusion weights            elsewhere                    the network's function
rescale    W/sigma, shift s          nothing                      changes
reinit     drawn anew, then rescale  nothing                      changes
migrate    W_b * sigma_b/tau         producers * tau/sigma_b      stays, to rounding
preserve   unchanged (see attach)    nothing                      stays, to the last bit
none       unchanged                 nothing                      stays, to the last bit
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor, nn

from equalize.errors import SiteError
from equalize.moments.covariance import SplitStatistics
from equalize.moments.measured import MeasuredBranch, MeasuredSite, values_of, with_moments
from equalize.moments.moments import Moments
from equalize.plan.apply import with_aliases
from equalize.plan.draw import draw_site
from equalize.plan.equation import Geometry, branch_vectors, fold_weight, scale_inputs, shift_of
from equalize.plan.indicator import with_expectation
from equalize.plan.plan import (
    CHANGES_FUNCTION,
    Add,
    Edit,
    Plan,
    PlannedSite,
    Scale,
    ScaleInputs,
    SiteStrategy,
    Strategy,
)
from equalize.sites.refusals import Refusal
from equalize.sites.sites import Site

# A branch whose scale is below this share of the largest, or of its own mean, is constant to float32.
_NEAR_ZERO = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A site and what is to be done with it once it is measured.

    Attributes:
        seed: of `reinit`.
        may_leave: whether it is left alone if nothing is to be gained.
    """

    site: Site
    strategy: SiteStrategy
    seed: int
    may_leave: bool = False

    @property
    def changes_function(self) -> bool:
        """Whether the layer will compute something else."""
        return self.strategy in CHANGES_FUNCTION


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The measured sites that can be equalized, why the others cannot, and the edits that it takes, in order.

    `choices` are as given, but for those that leave their site alone.
    """

    choices: tuple[Choice, ...]
    sites: tuple[PlannedSite, ...]
    refusals: tuple[Refusal, ...]
    edits: tuple[Edit, ...]


def make_plan(
    model: nn.Module,
    sites: Sequence[Site],
    moments: Mapping[str, Sequence[Moments]],
    strategy: Strategy = "preserve",
    seed: int = 0,
    keep_norm: bool = False,
    newly_initialized: Collection[str] = (),
) -> Plan:
    """The edits that embed scale equalization into `model`, which is not changed.

    Args:
        model: holds the weights that the shifts and norms are computed from.
        sites: from `scan`. moments: from `measure`, by layer.
        strategy: for all sites; "auto" decides for each site, see `choose`.
        seed: of `reinit`; the site at place i draws under seed + i.
        keep_norm: rescale each equalized weight to the norm it had.
        newly_initialized: state-dict keys of weights that were drawn just now.

    Raises:
        SiteError: for an unknown strategy, or a site without moments.
    """
    decision = decide(model, choose(sites, strategy, seed, newly_initialized), moments, keep_norm=keep_norm)
    return Plan(
        strategy=strategy,
        seed=seed,
        keep_norm=keep_norm,
        sites=decision.sites,
        edits=with_aliases(decision.edits, model),
        refusals=decision.refusals,
    )


def choose(
    sites: Sequence[Site], strategy: Strategy, seed: int = 0, newly_initialized: Collection[str] = ()
) -> list[Choice]:
    """The strategy of each site; the one at place i draws under seed + i.

    "auto": `rescale` for a weight that was drawn just now; `migrate` where a branch can move and all can come to one
    scale, that is, at most one is fixed; else `preserve`. It may leave a site alone once that is measured.

    Raises:
        SiteError: for an unknown strategy.
    """
    if strategy not in get_args(Strategy):
        raise SiteError("strategy", "is unknown", got=strategy, expected=" or ".join(get_args(Strategy)))
    return [
        Choice(
            site=site,
            strategy=_automatic(site, newly_initialized) if strategy == "auto" else strategy,
            seed=seed + place,
            may_leave=strategy == "auto",
        )
        for place, site in enumerate(sites)
    ]


def _automatic(site: Site, newly_initialized: Collection[str]) -> SiteStrategy:
    if site.weight in newly_initialized:
        return "rescale"
    fixed = sum(branch.fixed is not None for branch in site.branches)
    return "migrate" if fixed < len(site.branches) and fixed <= 1 else "preserve"


def decide(
    model: nn.Module,
    choices: Sequence[Choice],
    moments: Mapping[str, Sequence[Moments]],
    statistics: Mapping[str, SplitStatistics] | None = None,
    *,
    keep_norm: bool,
) -> Decision:
    """The edits for measured sites, computed from the weights that `model` has; it is not changed.

    `statistics` of a layer's input say whether to leave it alone, see `indicator`.
    """
    sites: list[PlannedSite] = []
    edits: list[Edit] = []
    refusals: list[Refusal] = []
    made: list[Choice] = []
    for choice in choices:
        layer = choice.site.layer
        if layer not in moments:
            raise SiteError(layer, "was not measured", remedy="give measure the same sites")
        measured = with_expectation(with_moments(choice.site, moments[layer]), (statistics or {}).get(layer))
        if choice.may_leave and measured.expect == "nothing":
            choice = replace(choice, strategy="none")
        made.append(choice)
        result = _edits(model, measured, choice, keep_norm=keep_norm)
        if isinstance(result, Refusal):
            refusals.append(result)
        else:
            sites.append(PlannedSite(**values_of(measured, MeasuredSite), strategy=choice.strategy))
            edits += result
    return Decision(choices=tuple(made), sites=tuple(sites), refusals=tuple(refusals), edits=tuple(edits))


def _edits(model: nn.Module, site: MeasuredSite, choice: Choice, *, keep_norm: bool) -> Sequence[Edit] | Refusal:
    """The edits for one site, or why there are none."""
    constant = next((branch for branch in site.branches if _is_constant(branch, site)), None)
    if constant is not None:
        where = f"channels {constant.start}..{constant.stop} ({constant.source})"
        return Refusal(at=site.layer, reason=f"sigma of {where} is near zero: {constant.std:.3g}")
    match choice.strategy:
        case "none" | "preserve":
            return ()
        case "migrate":
            return _migrate(site, model.get_parameter(site.weight).detach().cpu(), keep_norm=keep_norm)
        case "rescale":
            return _rescale(site, model.get_parameter(site.weight).detach().cpu(), keep_norm=keep_norm)
        case "reinit":
            try:
                layer, draws = draw_site(model, site, choice.seed)
            except SiteError as error:
                return Refusal(at=site.layer, reason=f"cannot be drawn anew: {error}")
            weight = layer.get_parameter(site.weight.rpartition(".")[2]).detach()
            return [*draws, *_rescale(site, weight, keep_norm=keep_norm)]


def _is_constant(branch: MeasuredBranch, site: MeasuredSite) -> bool:
    largest = max(each.std for each in site.branches)
    return branch.std <= _NEAR_ZERO * max(largest, abs(branch.mean))


def _rescale(site: MeasuredSite, v: Tensor, *, keep_norm: bool) -> list[Edit]:
    geometry, v = Geometry.of(site), v.double()
    mean_I, std_I = branch_vectors(site)
    gain = float(v.norm() / fold_weight(v, std_I, geometry).norm()) if keep_norm else 1.0
    edits: list[Edit] = [_scale_branch(site, branch, gain / branch.std) for branch in site.branches]
    shift_O = gain * shift_of(v, mean_I, std_I, geometry)
    if site.shift == "bias" and site.bias is not None:
        edits.append(Add(tensor=site.bias, values=tuple((-shift_O).tolist())))
    elif site.shift == "running_mean":
        edits.append(Add(tensor=f"{site.norm}.running_mean", values=tuple(shift_O.tolist())))
    return edits


def _migrate(site: MeasuredSite, w: Tensor, *, keep_norm: bool) -> list[Edit] | Refusal:
    """All branches come to one scale tau: that of the fixed ones, else their mean or the one that keeps the norm."""
    moving = [branch for branch in site.branches if branch.fixed is None]
    fixed = [branch for branch in site.branches if branch.fixed is not None]
    if not moving:
        reasons = "; ".join(dict.fromkeys(str(branch.fixed) for branch in fixed))
        return Refusal(at=site.layer, reason=f"no branch can move: {reasons}")
    if keep_norm and not fixed:
        _, std_I = branch_vectors(site)
        tau = float(scale_inputs(w.double(), std_I, Geometry.of(site)).norm() / w.double().norm())
    else:
        tau = math.exp(math.fsum(math.log(branch.std) for branch in fixed or moving) / len(fixed or moving))
    edits: list[Edit] = []
    for branch in moving:
        edits.append(_scale_branch(site, branch, branch.std / tau))
        edits += [Scale(tensor=key, factor=tau / branch.std) for key in branch.producers]
    return edits


def _scale_branch(site: MeasuredSite, branch: MeasuredBranch, factor: float) -> ScaleInputs:
    return ScaleInputs(
        tensor=site.weight,
        axis=site.axis,
        start=branch.start,
        stop=branch.stop,
        groups=1 if "transpose" in site.op else site.groups,
        factor=factor,
    )
