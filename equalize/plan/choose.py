"""Chooses the strategy of each site, for all that share branches together.

A branch that several sites read can be scaled once only. The first of them in graph order that migrates moves it; for
the others it then stays where that put it, as a branch stays that cannot move.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from equalize.errors import SiteError
from equalize.moments.measured import MeasuredSite
from equalize.plan.plan import CHANGES_FUNCTION, SiteStrategy, Strategy
from equalize.sites.branches import Branch
from equalize.sites.sites import Site


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


def choose(
    sites: Sequence[Site], strategy: Strategy, seed: int = 0, newly_initialized: Collection[str] = ()
) -> list[Choice]:
    """The strategy of each site; the one at place i draws under seed + i. A SiteError for an unknown strategy.

    "auto": `rescale` for a weight that was drawn just now; `migrate` where a branch can move and all can come to one
    scale, that is, at most one stays where it is; else `preserve`. It may leave a site alone once that is measured.
    """
    if strategy not in get_args(Strategy):
        raise SiteError("strategy", "is unknown", got=strategy, expected=" or ".join(get_args(Strategy)))
    rewritten = {site.layer for site in sites if strategy == "auto" and site.weight in newly_initialized}
    by_weight = {site.weight: site for site in sites}
    sites = [
        replace(site, branches=tuple(_held(site, each, by_weight, rewritten) for each in site.branches))
        for site in sites
    ]
    chosen = _automatic(sites, rewritten) if strategy == "auto" else (strategy for _ in sites)
    return [
        Choice(site=site, strategy=each, seed=seed + place, may_leave=strategy == "auto")
        for place, (site, each) in enumerate(zip(sites, chosen, strict=True))
    ]


def _held(site: Site, branch: Branch, by_weight: Mapping[str, Site], rewritten: Collection[str]) -> Branch:
    """The branch, fixed where another site reads it and cannot follow."""
    for reader in branch.readers:
        other = by_weight.get(reader.weight)
        if other is None:
            continue
        if (reader.start, reader.stop) not in {(each.start, each.stop) for each in other.branches}:
            why = "where it is a part of a branch, or several"
        elif other.layer in rewritten or not set(rewritten).isdisjoint(set(site.upstream) ^ set(other.upstream)):
            why = "whose weights are drawn just now, or which is measured after such"
        else:
            continue
        return replace(
            branch, producers=(), readers=(), fixed=f"this branch feeds another layer too: {other.layer}, {why}"
        )
    return branch


def _automatic(sites: Sequence[Site], rewritten: Collection[str]) -> Iterator[SiteStrategy]:
    moved: dict[str, tuple[str, object]] = {}  # by producer: the tensor that was brought to a scale, and which
    for site in sites:
        if site.layer in rewritten:
            yield "rescale"
            continue
        stay = {_scale_of(site, branch, moved) for branch in site.branches} - {None}
        if len(stay) > 1 or all(branch.fixed is not None for branch in site.branches):
            yield "preserve"
            continue
        scale = next(iter(stay), site.layer)
        for branch in site.branches:
            for key in branch.producers:
                moved.setdefault(key, (branch.tensor, scale))
        yield "migrate"


def _scale_of(site: Site, branch: Branch, moved: Mapping[str, tuple[str, object]]) -> object:
    """A name for the scale that a branch stays at, None if it can move; the same name where it is the same scale."""
    if branch.fixed is not None:
        return branch.tensor or (site.layer, branch.start)
    if branch.producers[0] not in moved:
        return None
    tensor, scale = moved[branch.producers[0]]
    return scale if tensor == branch.tensor else (site.layer, branch.start)


def left_alone(choices: Sequence[Choice], measured: Mapping[str, MeasuredSite]) -> set[str]:
    """Layers that are left alone: nothing is to be gained, nor at any site that a branch is moved together with."""
    layers = {choice.site.weight: choice.site.layer for choice in choices}
    pairs = [
        {choice.site.layer, layers[reader.weight]}
        for choice in choices
        if choice.strategy == "migrate"
        for branch in choice.site.branches
        for reader in branch.readers
        if reader.weight in layers
    ]
    left = {
        choice.site.layer for choice in choices if choice.may_leave and measured[choice.site.layer].expect == "nothing"
    }
    while any(involved := [pair for pair in pairs if len(pair & left) == 1]):
        left -= set().union(*involved)
    return left
