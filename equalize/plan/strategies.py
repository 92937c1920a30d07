"""Sites and moments become a plan: which strategy each site gets, and the edits it takes.

strategy   fusion weights            elsewhere                    the network's function
rescale    W/sigma, shift s          nothing                      changes
reinit     drawn anew, then rescale  nothing                      changes
migrate    W_b * sigma_b/tau         producers * tau/sigma_b      stays, to rounding
preserve   unchanged (see training)  nothing                      stays, to the last bit
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from torch import Tensor, nn

from equalize.errors import SiteError
from equalize.moments.moments import Moments
from equalize.plan.apply import redraw, with_aliases
from equalize.plan.equation import Geometry, fold_equalizer, per_channel
from equalize.plan.plan import Edit, Plan, Strategy
from equalize.sites.branches import Branch
from equalize.sites.sites import Refusal, Site

__all__ = ["CHANGES_FUNCTION", "choose", "equalize_site", "make_plan"]

CHANGES_FUNCTION = frozenset({"reinit", "rescale"})

# A branch whose scale is below this share of the largest, or of its own mean, is constant to float32.
_NEAR_ZERO = 1e-6


def make_plan(
    model: nn.Module,
    sites: Sequence[Site],
    moments: Mapping[str, Sequence[Moments]],
    strategy: Strategy = "preserve",
    seed: int = 0,
    keep_norm: bool = False,
    drawn: Collection[str] = (),
) -> Plan:
    """The edits that embed scale equalization into `model`, which is not changed.

    Args:
        model: holds the weights that the shifts and norms are computed from.
        sites: from `scan`. moments: from `measure`, by layer.
        strategy: for all sites; "auto" takes each by itself, see `choose`.
        seed: of `reinit`; the site at place i draws under seed + i.
        keep_norm: rescale each equalized weight to the norm it had.
        drawn: state-dict keys of weights that were drawn just now.

    Raises:
        SiteError: for an unknown strategy, or a site without moments.
    """
    done: list[Site] = []
    edits: list[Edit] = []
    refusals: list[Refusal] = []
    for place, site in enumerate(sites):
        if site.layer not in moments:
            raise SiteError(site.layer, "was not measured", remedy="give measure the same sites")
        measured = with_moments(replace(site, strategy=choose(site, strategy, drawn)), moments[site.layer])
        result = equalize_site(model, measured, seed=seed + place, keep_norm=keep_norm)
        if isinstance(result, Refusal):
            refusals.append(result)
        else:
            done.append(measured)
            edits += result
    return Plan(
        strategy=strategy,
        seed=seed,
        keep_norm=keep_norm,
        sites=tuple(done),
        edits=with_aliases(edits, model),
        refusals=tuple(refusals),
    )


def choose(site: Site, strategy: Strategy, drawn: Collection[str] = ()) -> str:
    """The strategy of one site.

    "auto": `rescale` for a weight that was drawn just now; `migrate` where a branch can move and all can come to one
    scale, that is, at most one is fixed; else `preserve`.
    """
    if strategy not in get_args(Strategy):
        raise SiteError("strategy", "is unknown", got=strategy, expected=" or ".join(get_args(Strategy)))
    if strategy != "auto":
        return strategy
    if site.weight in drawn:
        return "rescale"
    fixed = sum(branch.fixed is not None for branch in site.branches)
    return "migrate" if fixed < len(site.branches) and fixed <= 1 else "preserve"


def with_moments(site: Site, moments: Sequence[Moments]) -> Site:
    """The site with its branches' measured moments."""
    branches = (
        replace(branch, count=each.count, mean=each.mean, std=each.std, ci95=each.ci95)
        for branch, each in zip(site.branches, moments, strict=True)
    )
    return replace(site, branches=tuple(branches))


def equalize_site(model: nn.Module, site: Site, *, seed: int, keep_norm: bool) -> list[Edit] | Refusal:
    """The edits for one measured site with its strategy chosen, or why there are none."""
    constant = next((branch for branch in site.branches if _is_constant(branch, site)), None)
    if constant is not None:
        where = f"channels {constant.start}..{constant.stop} ({constant.source})"
        return Refusal(at=site.layer, reason=f"sigma of {where} is near zero: {constant.std:.3g}")
    if site.strategy == "preserve":
        return []
    weight = model.get_parameter(site.weight).detach().cpu()
    if site.strategy == "migrate":
        return _migrate(site, weight, keep_norm=keep_norm)
    draws: list[Edit] = []
    if site.strategy == "reinit":
        try:
            fresh = redraw(model.get_submodule(site.weight.rpartition(".")[0]), seed)
        except (SiteError, AttributeError) as error:
            return Refusal(at=site.layer, reason=f"cannot be drawn anew: {error}")
        weight = getattr(fresh, site.weight.rpartition(".")[2]).detach()
        keys = [site.weight] + ([site.bias] if site.bias else [])
        draws = [Edit(tensor=key, action="draw", seed=seed) for key in keys]
    return draws + _rescale(site, weight, keep_norm=keep_norm)


def _is_constant(branch: Branch, site: Site) -> bool:
    assert branch.std is not None
    assert branch.mean is not None
    largest = max(each.std or 0.0 for each in site.branches)
    return branch.std <= _NEAR_ZERO * max(largest, abs(branch.mean))


def _rescale(site: Site, v: Tensor, *, keep_norm: bool) -> list[Edit]:
    geometry = Geometry.of(site)
    mean_I, std_I = branch_vectors(site)
    w, shift_O = fold_equalizer(v.double(), mean_I, std_I, geometry)
    gain = float(v.double().norm() / w.norm()) if keep_norm else 1.0
    edits = [_scale_branch(site, branch, gain / _std(branch)) for branch in site.branches]
    if site.shift == "bias":
        assert site.bias is not None
        edits.append(Edit(tensor=site.bias, action="add", values=tuple((-gain * shift_O).tolist())))
    elif site.shift == "running_mean":
        edits.append(Edit(tensor=f"{site.norm}.running_mean", action="add", values=tuple((gain * shift_O).tolist())))
    return edits


def _migrate(site: Site, w: Tensor, *, keep_norm: bool) -> list[Edit] | Refusal:
    """All branches come to one scale tau: that of the fixed ones, else whatever suits."""
    moving = [branch for branch in site.branches if branch.fixed is None]
    fixed = [branch for branch in site.branches if branch.fixed is not None]
    if not moving:
        reasons = "; ".join(dict.fromkeys(str(branch.fixed) for branch in fixed))
        return Refusal(at=site.layer, reason=f"no branch can move: {reasons}")
    if keep_norm and not fixed:
        mean_I, std_I = branch_vectors(site)
        v, _ = fold_equalizer(w.double(), mean_I, 1 / std_I, Geometry.of(site))
        tau = float(v.norm() / w.double().norm())
    else:
        tau = math.exp(math.fsum(math.log(_std(branch)) for branch in fixed or moving) / len(fixed or moving))
    edits: list[Edit] = []
    for branch in moving:
        edits.append(_scale_branch(site, branch, _std(branch) / tau))
        edits += [Edit(tensor=key, action="scale", factor=tau / _std(branch)) for key in branch.producers]
    return edits


def _scale_branch(site: Site, branch: Branch, factor: float) -> Edit:
    return Edit(
        tensor=site.weight,
        action="scale",
        axis=site.axis,
        start=branch.start,
        stop=branch.stop,
        groups=1 if "transpose" in site.op else site.groups,
        factor=factor,
    )


def _std(branch: Branch) -> float:
    assert branch.std is not None
    return branch.std


def branch_vectors(site: Site, scales: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every input channel's branch, (I,) each, divided by each branch's scale."""
    scales = scales or (1.0,) * len(site.branches)
    pairs = list(zip(site.branches, scales, strict=True))
    return (
        per_channel([(branch.start, branch.stop, (branch.mean or 0.0) / scale) for branch, scale in pairs]),
        per_channel([(branch.start, branch.stop, _std(branch) / scale) for branch, scale in pairs]),
    )
