"""Chooses the strategy of each site and computes the edits of a plan from the moments.

strategy   fusion weights            elsewhere                    the network's function
rescale    W_b * tau/sigma_b         shift s in the bias          changes
reinit     drawn anew, then rescale  likewise                     changes
migrate    W_b * sigma_b/tau         producers * tau/sigma_b      stays, to rounding
preserve   unchanged (see attach)    nothing                      stays, to the last bit

tau is the site's `target_scale`; `migrate` keeps the function at any, and takes the scale of the branches that cannot
move, the geometric mean of their sigmas, or sigma_rms where all move.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import get_args

from torch import Tensor, nn

from equalize.errors import SiteError
from equalize.moments.measured import MeasuredBranch, MeasuredSite, sigma_rms, values_of, with_moments
from equalize.moments.moments import Moments
from equalize.plan.apply import with_aliases
from equalize.plan.draw import draw_site
from equalize.plan.equation import DiagonalMap, Geometry, branch_vectors, shift_of
from equalize.plan.plan import (
    CHANGES_FUNCTION,
    Add,
    Edit,
    Plan,
    PlannedSite,
    Scale,
    ScaleInputs,
    ScaleTo,
    SiteStrategy,
    Strategy,
    target_scale,
)
from equalize.sites.refusals import Refusal
from equalize.sites.sites import Site

# A branch whose scale is below this share of the largest, or of its own mean, is constant to float32.
_NEAR_ZERO = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A site and what is to be done with it once it is measured; `seed` is of `reinit`."""

    site: Site
    strategy: SiteStrategy
    seed: int

    @property
    def changes_function(self) -> bool:
        """Whether the layer will compute something else."""
        return self.strategy in CHANGES_FUNCTION


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The measured sites that are equalized, why the others are not, and the edits that it takes, in order."""

    sites: tuple[PlannedSite, ...]
    refusals: tuple[Refusal, ...]
    edits: tuple[Edit, ...]


def make_plan(
    model: nn.Module,
    sites: Sequence[Site],
    moments: Mapping[str, Sequence[Moments]],
    strategy: Strategy = "preserve",
    seed: int = 0,
    scale: ScaleTo = "step",
    newly_initialized: Collection[str] = (),
) -> Plan:
    """The edits that embed scale equalization into `model`, which is not changed.

    Args:
        model: holds the weights that the shifts and norms are computed from.
        sites: from `scan`. moments: from `measure`, by layer.
        strategy: for all sites; "auto" decides for each site, see `choose`.
        seed: of `reinit`; the site at place i draws under seed + i.
        scale: what to equalize to, "step" or "paper", see `target_scale`.
        newly_initialized: state-dict keys of weights that were drawn just now.

    Raises:
        SiteError: for an unknown strategy or scale, or a site without moments.
    """
    decision = decide(model, choose(sites, strategy, seed, newly_initialized), moments, scale=scale)
    return Plan(
        strategy=strategy,
        seed=seed,
        scale=scale,
        sites=decision.sites,
        edits=with_aliases(decision.edits, model),
        refusals=decision.refusals,
    )


def choose(
    sites: Sequence[Site], strategy: Strategy, seed: int = 0, newly_initialized: Collection[str] = ()
) -> list[Choice]:
    """The strategy of each site; the one at place i draws under seed + i.

    "auto": `rescale` for a weight that was drawn just now; `migrate` where a branch can move and all can come to one
    scale, that is, at most one is fixed; else `preserve`.

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
        )
        for place, site in enumerate(sites)
    ]


def _automatic(site: Site, newly_initialized: Collection[str]) -> SiteStrategy:
    if site.weight in newly_initialized:
        return "rescale"
    fixed = sum(branch.fixed is not None for branch in site.branches)
    return "migrate" if fixed < len(site.branches) and fixed <= 1 else "preserve"


def decide(
    model: nn.Module, choices: Sequence[Choice], moments: Mapping[str, Sequence[Moments]], *, scale: ScaleTo
) -> Decision:
    """The edits for measured sites, computed from the weights that `model` has; it is not changed."""
    if scale not in get_args(ScaleTo):
        raise SiteError("scale", "is unknown", got=scale, expected=" or ".join(get_args(ScaleTo)))
    sites: list[PlannedSite] = []
    edits: list[Edit] = []
    refusals: list[Refusal] = []
    for choice in choices:
        layer = choice.site.layer
        if layer not in moments:
            raise SiteError(layer, "was not measured", remedy="give measure the same sites")
        measured = with_moments(choice.site, moments[layer])
        constant = next((branch for branch in measured.branches if _is_constant(branch, measured)), None)
        if constant is not None:
            where = f"channels {constant.start}..{constant.stop} ({constant.source})"
            refusals.append(Refusal(at=layer, reason=f"sigma of {where} is near zero: {constant.std:.3g}"))
            continue
        tau = _tau(measured, choice.strategy, scale)
        site = PlannedSite(**values_of(measured, MeasuredSite), strategy=choice.strategy, tau=tau)
        result = _edits(model, site, choice.seed)
        if isinstance(result, Refusal):
            refusals.append(result)
        else:
            sites.append(site)
            edits += result
    return Decision(sites=tuple(sites), refusals=tuple(refusals), edits=tuple(edits))


def _is_constant(branch: MeasuredBranch, site: MeasuredSite) -> bool:
    largest = max(each.std for each in site.branches)
    return branch.std <= _NEAR_ZERO * max(largest, abs(branch.mean))


def _tau(site: MeasuredSite, strategy: SiteStrategy, scale: ScaleTo) -> float:
    if strategy != "migrate":
        return target_scale(site, scale)
    fixed = [branch.std for branch in site.branches if branch.fixed is not None]
    return geometric_mean(fixed) if fixed else sigma_rms(site.branches)


def _edits(model: nn.Module, site: PlannedSite, seed: int) -> Sequence[Edit] | Refusal:
    """The edits for one site, or why there are none."""
    match site.strategy:
        case "preserve":
            return ()
        case "migrate":
            return _migrate(site)
        case "rescale":
            return _rescale(site, model.get_parameter(site.weight).detach().cpu())
        case "reinit":
            try:
                layer, draws = draw_site(model, site, seed)
            except SiteError as error:
                return Refusal(at=site.layer, reason=f"cannot be drawn anew: {error}")
            weight = layer.get_parameter(site.weight.rpartition(".")[2]).detach()
            return [*draws, *_rescale(site, weight)]


def _rescale(site: PlannedSite, v: Tensor) -> list[Edit]:
    edits: list[Edit] = [_scale_branch(site, branch, site.tau / branch.std) for branch in site.branches]
    if site.shift == "bias" and site.bias is not None:
        geometry = Geometry.of(site)
        mean_I, std_I = branch_vectors(site)
        w = DiagonalMap(factor_I=site.tau / std_I, geometry=geometry).fold(v.double())
        edits.append(Add(tensor=site.bias, values=tuple((-shift_of(w, mean_I, geometry)).tolist())))
    return edits


def _migrate(site: PlannedSite) -> list[Edit] | Refusal:
    """Brings all branches that can move to the scale tau."""
    moving = [branch for branch in site.branches if branch.fixed is None]
    if not moving:
        reasons = "; ".join(dict.fromkeys(str(branch.fixed) for branch in site.branches))
        return Refusal(at=site.layer, reason=f"no branch can move: {reasons}")
    edits: list[Edit] = []
    for branch in moving:
        edits.append(_scale_branch(site, branch, branch.std / site.tau))
        edits += [Scale(tensor=key, factor=site.tau / branch.std) for key in branch.producers]
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
