"""Chooses the strategy of each site before it is measured."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import get_args

from equalize.errors import SiteError
from equalize.plan.plan import SiteStrategy, Strategy, changes_function
from equalize.sites.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A site and what is to be done with it once it is measured.

    Attributes:
        seed: of `reinit`.
        newly_initialized: whether its weights were drawn just now.
        may_leave: whether it is left alone if nothing is to be gained.
    """

    site: Site
    strategy: SiteStrategy
    seed: int
    newly_initialized: bool = False
    may_leave: bool = False

    @property
    def changes_function(self) -> bool:
        """Whether the layer will compute something else."""
        return changes_function(self.strategy, self.newly_initialized)


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
            newly_initialized=site.weight in newly_initialized,
            may_leave=strategy == "auto",
        )
        for place, site in enumerate(sites)
    ]


def _automatic(site: Site, newly_initialized: Collection[str]) -> SiteStrategy:
    if site.weight in newly_initialized:
        return "rescale"
    fixed = sum(branch.fixed is not None for branch in site.branches)
    return "migrate" if fixed < len(site.branches) and fixed <= 1 else "preserve"
