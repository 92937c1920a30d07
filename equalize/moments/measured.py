"""Sites whose branches were measured. Pure Python."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from equalize.sites.branches import Branch
from equalize.sites.sites import Site

if TYPE_CHECKING:
    from equalize.moments.moments import Moments


Expectation = Literal["gain", "nothing", "unclear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredBranch(Branch):
    """A branch and its population moments over N, space and its channels.

    Attributes:
        count, mean, std: how many numbers, their mean and standard deviation.
        ci95: half width of the 95 % interval of `std`, relative to it; None where one image was seen.
        step_share: how much of a step of the layer's output, of plain weights under SGD, goes through this branch:
            C_b sigma_b^2 over the sum of all; None in plans of earlier versions.
    """

    count: int
    mean: float
    std: float
    ci95: float | None
    step_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSite(Site):
    """A fusion layer whose branches were measured.

    Attributes:
        expect: whether training is expected to gain by equalizing it; `unclear` also where that was not measured.
        delta: by how much more of the labels' variance, see `equalize.plan.indicator`; None where not measured.
    """

    branches: tuple[MeasuredBranch, ...]
    expect: Expectation = "unclear"
    delta: float | None = None


def with_moments(site: Site, moments: Sequence["Moments"]) -> MeasuredSite:
    """A site with the moments of its branches, in order."""
    pairs = list(zip(site.branches, moments, strict=True))
    energies = [(branch.stop - branch.start) * each.var for branch, each in pairs]
    branches = tuple(
        MeasuredBranch(
            **values_of(branch, Branch),
            count=each.count,
            mean=each.mean,
            std=each.std,
            ci95=each.ci95,
            step_share=energy / sum(energies) if any(energies) else None,
        )
        for (branch, each), energy in zip(pairs, energies, strict=True)
    )
    return MeasuredSite(**{**values_of(site, Site), "branches": branches})


def values_of(found: Site | Branch, kind: type[Site] | type[Branch]) -> dict[str, Any]:
    """The attributes that `kind` has, by name: what a type that says more is made from."""
    return {each.name: getattr(found, each.name) for each in fields(kind)}
