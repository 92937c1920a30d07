"""Sites whose branches were measured. Pure Python."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from equalize.sites.branches import Branch
from equalize.sites.sites import Site

if TYPE_CHECKING:
    from equalize.moments.moments import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredBranch(Branch):
    """A branch and its population moments over N, space and its channels.

    Attributes:
        count, mean, std: how many numbers, their mean and standard deviation.
        ci95: half width of the 95 % interval of `std`, relative to it; None where one image was seen.
    """

    count: int
    mean: float
    std: float
    ci95: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSite(Site):
    """A fusion layer whose branches were measured."""

    branches: tuple[MeasuredBranch, ...]


def sigma_rms(branches: Sequence[MeasuredBranch]) -> float:
    """The one standard deviation under which a layer's input has the power of its branches: the root mean square of
    their sigmas, weighted by their channels."""
    widths = [branch.stop - branch.start for branch in branches]
    powers = (width * branch.std**2 for width, branch in zip(widths, branches, strict=True))
    return math.sqrt(math.fsum(powers) / sum(widths))


def with_moments(site: Site, moments: Sequence["Moments"]) -> MeasuredSite:
    """A site with the moments of its branches, in order."""
    branches = tuple(
        MeasuredBranch(**values_of(branch, Branch), count=each.count, mean=each.mean, std=each.std, ci95=each.ci95)
        for branch, each in zip(site.branches, moments, strict=True)
    )
    return MeasuredSite(**{**values_of(site, Site), "branches": branches})


def values_of(found: Site | Branch, kind: type[Site] | type[Branch]) -> dict[str, Any]:
    """The attributes that `kind` has, by name: what a type that says more is made from."""
    return {each.name: getattr(found, each.name) for each in fields(kind)}
