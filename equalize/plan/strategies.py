"""Computes the edits of a plan from the moments and the strategy of each site.

strategy   fusion weights            elsewhere                    the network's function
rescale    W_b * tau/sigma_b         shift s in the bias          changes
reinit     drawn anew, then rescale  likewise                     changes
migrate    W_b * sigma_b/tau         producers * tau/sigma_b      stays, to rounding
preserve   unchanged (see attach)    nothing                      stays, to the last bit
none       unchanged                 nothing                      stays, to the last bit

tau is the site's `target_scale`; `migrate` keeps the function at any, and takes the scale of the branches that stay
where they are, the geometric mean of their sigmas, or sigma_rms where all move. Other layers that read a moved branch
have their weights scaled along.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import get_args

from torch import Tensor, nn

from equalize.errors import SiteError
from equalize.moments.covariance import SplitStatistics
from equalize.moments.measured import MeasuredBranch, MeasuredSite, sigma_rms, values_of, with_moments
from equalize.moments.moments import Moments
from equalize.moments.watch import demand_tensors
from equalize.plan.apply import with_aliases
from equalize.plan.choose import Choice, choose, left_alone
from equalize.plan.draw import draw_site
from equalize.plan.edits import Add, Edit, Scale, ScaleInputs
from equalize.plan.equation import DiagonalMap, Geometry, branch_vectors, shift_of
from equalize.plan.indicator import Optimizer, with_expectation
from equalize.plan.plan import Plan, PlannedSite, ScaleTo, SiteStrategy, Strategy, target_scale
from equalize.sites.branches import Branch
from equalize.sites.readers import Reader
from equalize.sites.refusals import Refusal
from equalize.sites.scan import Scan
from equalize.sites.sites import Site
from equalize.wrappers import unwrapped

# A branch whose scale is below this share of the largest, or of its own mean, is constant to float32.
_NEAR_ZERO = 1e-6


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
    sites: Sequence[Site] | Scan,
    moments: Mapping[str, Sequence[Moments]],
    strategy: Strategy = "preserve",
    seed: int = 0,
    scale: ScaleTo = "step",
    newly_initialized: Collection[str] = (),
) -> Plan:
    """The edits that embed scale equalization into `model`, which is not changed.

    Args:
        model: holds the weights that the shifts and norms are computed from.
        sites: from `scan`, or what it gave. moments: from `measure`, by layer.
        strategy: for all sites; "auto" decides for each site, see `choose`.
        seed: of `reinit`; the site at place i draws under seed + i.
        scale: what to equalize to, "step" or "paper", see `target_scale`.
        newly_initialized: state-dict keys of weights that were drawn just now.

    Raises:
        SiteError: for an unknown strategy or scale, or a site that is not in the network or has no moments.
    """
    model = unwrapped(model)
    sites = sites.sites if isinstance(sites, Scan) else sites
    demand_tensors(model, [site.weight for site in sites])
    choices = choose(sites, strategy, seed, newly_initialized)
    decision = decide(model, choices, moments, scale=scale)
    return Plan(
        strategy=strategy,
        seed=seed,
        scale=scale,
        sites=decision.sites,
        edits=with_aliases(decision.edits, model),
        refusals=decision.refusals,
    )


def decide(
    model: nn.Module,
    choices: Sequence[Choice],
    moments: Mapping[str, Sequence[Moments]],
    statistics: Mapping[str, SplitStatistics] | None = None,
    *,
    scale: ScaleTo,
    optimizer: Optimizer = "adamw",
) -> Decision:
    """The edits for measured sites, computed from the weights that `model` has; it is not changed.

    `statistics` of a layer's input say whether to leave it alone when it is trained by that optimizer, see `indicator`.
    """
    if scale not in get_args(ScaleTo):
        raise SiteError("scale", "is unknown", got=scale, expected=" or ".join(get_args(ScaleTo)))
    sites: list[PlannedSite] = []
    edits: list[Edit] = []
    refusals: list[Refusal] = []
    made: list[Choice] = []
    moved: dict[str, float] = {}
    measured = _measured(choices, moments, statistics or {}, optimizer)
    left = left_alone(choices, measured)
    for choice in choices:
        layer = choice.site.layer
        if layer in left:
            choice = replace(choice, strategy="none")
        made.append(choice)
        if (constant := _constant(measured[layer])) is not None:
            refusals.append(constant)
            continue
        site = PlannedSite(
            **values_of(measured[layer], MeasuredSite),
            strategy=choice.strategy,
            tau=_tau(measured[layer], choice.strategy, scale, moved),
        )
        result = _edits(model, site, choice.seed, moved)
        if isinstance(result, Refusal):
            refusals.append(result)
        else:
            sites.append(site)
            edits += result
    return Decision(choices=tuple(made), sites=tuple(sites), refusals=tuple(refusals), edits=tuple(edits))


def _measured(
    choices: Sequence[Choice],
    moments: Mapping[str, Sequence[Moments]],
    statistics: Mapping[str, SplitStatistics],
    optimizer: Optimizer,
) -> dict[str, MeasuredSite]:
    """The sites by layer, each with what was measured of it."""
    sites = {choice.site.layer: choice.site for choice in choices}
    for layer, site in sites.items():
        if len(moments.get(layer, ())) != len(site.branches):
            got = f"moments of {len(moments.get(layer, ()))} branches"
            remedy = "give measure the same sites"
            raise SiteError(layer, "was not measured", got=got, expected=len(site.branches), remedy=remedy)
    return {
        layer: with_expectation(with_moments(site, moments[layer]), statistics.get(layer), optimizer)
        for layer, site in sites.items()
    }


def _constant(site: MeasuredSite) -> Refusal | None:
    """A refusal where a branch is constant."""
    largest = max(branch.std for branch in site.branches)
    for branch in site.branches:
        if branch.std <= _NEAR_ZERO * max(largest, abs(branch.mean)):
            where = f"channels {branch.start}..{branch.stop} ({branch.source})"
            return Refusal(at=site.layer, reason=f"sigma of {where} is near zero: {branch.std:.3g}")
    return None


def _tau(site: MeasuredSite, strategy: SiteStrategy, scale: ScaleTo, moved: Mapping[str, float]) -> float:
    if strategy != "migrate":
        return target_scale(site, scale)
    stay = [sigma for branch in site.branches if (sigma := _staying(branch, moved)) is not None]
    return geometric_mean(stay) if stay else sigma_rms(site.branches)


def _staying(branch: MeasuredBranch, moved: Mapping[str, float]) -> float | None:
    """The sigma of a branch that stays where it is or where an earlier site moved it; None if it can move."""
    if branch.fixed is not None:
        return branch.std
    factor = moved.get(branch.producers[0])
    return None if factor is None else branch.std * factor


def _edits(model: nn.Module, site: PlannedSite, seed: int, moved: dict[str, float]) -> Sequence[Edit] | Refusal:
    """The edits for one site, or why there are none; `migrate` adds factors to `moved`."""
    match site.strategy:
        case "none" | "preserve":
            return ()
        case "migrate":
            return _migrate(site, moved)
        case "rescale":
            return _rescale(site, model.get_parameter(site.weight).detach().cpu())
        case "reinit":
            try:
                layer, draws = draw_site(model, site, seed)
            except SiteError as error:
                return Refusal(at=site.layer, reason=f"cannot be drawn anew: {error}")
            return [*draws, *_rescale(site, layer.get_parameter(site.weight.rpartition(".")[2]).detach())]


def _rescale(site: PlannedSite, v: Tensor) -> list[Edit]:
    _, std_I = branch_vectors(site)
    w = DiagonalMap(factor_I=site.tau / std_I, geometry=Geometry.of(site)).fold(v.double())
    return [*(_scale_branch(site, branch, site.tau / branch.std) for branch in site.branches), *_shift(site, w)]


def _shift(site: PlannedSite, w: Tensor) -> list[Edit]:
    """Takes the response of the weights to the means out of the bias, where the site has a shift."""
    if site.shift != "bias" or site.bias is None:
        return []
    mean_I, _ = branch_vectors(site)
    return [Add(tensor=site.bias, values=tuple((-shift_of(w, mean_I, Geometry.of(site))).tolist()))]


def _migrate(site: PlannedSite, moved: dict[str, float]) -> list[Edit] | Refusal:
    """Brings all branches that can move to the scale tau; `moved` has the factors of producers, and gets more."""
    if all(branch.fixed is not None for branch in site.branches):
        reasons = "; ".join(dict.fromkeys(str(branch.fixed) for branch in site.branches))
        return Refusal(at=site.layer, reason=f"no branch can be brought to another scale: {reasons}")
    edits: list[Edit] = []
    for branch in site.branches:
        if _staying(branch, moved) is not None:
            continue
        edits.append(_scale_branch(site, branch, branch.std / site.tau))
        edits += [
            _scale_inputs(reader.weight, reader, reader.axis, reader.groups, branch.std / site.tau)
            for reader in branch.readers
        ]
        edits += [Scale(tensor=key, factor=site.tau / branch.std) for key in branch.producers]
        moved |= dict.fromkeys(branch.producers, site.tau / branch.std)
    return edits


def _scale_branch(site: MeasuredSite, branch: MeasuredBranch, factor: float) -> ScaleInputs:
    groups = 1 if "transpose" in site.op else site.groups
    return _scale_inputs(site.weight, branch, site.axis, groups, factor)


def _scale_inputs(weight: str, read: Branch | Reader, axis: int, groups: int, factor: float) -> ScaleInputs:
    return ScaleInputs(tensor=weight, axis=axis, start=read.start, stop=read.stop, groups=groups, factor=factor)
