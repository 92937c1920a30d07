"""Chooses each arm's rate by the seeds that tune: sweeps it, and goes on where the best lies at an edge.

Everything is decided by the scores of finished runs alone, so that a comparison that is resumed decides the same.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from equalize.commands.compare.setup import Run, Setup
from equalize.errors import NumericsError

_MOST_STEPS = 6  # of a sweep beyond the rates that were asked for, in either direction
_SAME = 1.2  # rates within this factor count as one


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The sweep of one arm."""

    arm: str
    rates: tuple[float, ...]
    """Those swept, in order; without the one ten times below the best, where that lies below all."""
    means: tuple[float, ...]
    """Mean final mIoU over the seeds that tune, a value a rate."""
    tenth: float
    """A rate ten times below the best, which was trained with too."""
    at_edge: bool
    """Whether the best is the lowest or the highest after all: the sweep had to end."""

    @property
    def best(self) -> float:
        """The rate with the highest mean."""
        return self.rates[self.means.index(max(self.means))]


def tune(setup: Setup, train: Callable[[Sequence[Run]], None], score: Callable[[Run], float]) -> dict[str, Tuned]:
    """Trains what is missing until every arm's best rate lies within its sweep, or the sweep was extended often enough.

    Beyond the rates that were asked for, a sweep also ends where training diverges. `train` trains the runs that are
    not finished, `score` gives the final mIoU of one that is.
    """
    sweeps = {arm.name: sorted(setup.rates) for arm in setup.arms}
    arms = {arm.name: arm for arm in setup.arms}

    def runs(rates: Mapping[str, Sequence[float]]) -> list[Run]:
        return [
            Run(arm=arm, rate=rate, seed=seed) for seed in setup.seeds for arm in setup.arms for rate in rates[arm.name]
        ]

    def mean(arm: str, rate: float) -> float:
        return sum(score(Run(arm=arms[arm], rate=rate, seed=seed)) for seed in setup.seeds) / len(setup.seeds)

    train(runs(sweeps))
    for arm, rates in sweeps.items():
        with contextlib.suppress(NumericsError):  # where training diverges, the sweep ends
            while further := _beyond(rates, [mean(arm, rate) for rate in rates], len(setup.rates)):
                train(runs({**dict.fromkeys(arms, ()), arm: further}))
                rates[:] = sorted([*rates, *further])
    means = {arm: [mean(arm, rate) for rate in rates] for arm, rates in sweeps.items()}
    bests = {arm: rates[means[arm].index(max(means[arm]))] for arm, rates in sweeps.items()}
    tenths = {arm: _near(rates, bests[arm] / 10) for arm, rates in sweeps.items()}
    train(runs({arm: [rate] for arm, rate in tenths.items()}))
    return {
        arm: Tuned(
            arm=arm,
            rates=tuple(rates),
            means=tuple(means[arm]),
            tenth=tenths[arm],
            at_edge=len(rates) > 1 and bests[arm] in (rates[0], rates[-1]),
        )
        for arm, rates in sweeps.items()
    }


def _beyond(rates: Sequence[float], means: Sequence[float], asked: int) -> list[float]:
    """The next rate of a sweep whose best is its lowest or highest, by the factor there; none if there is none."""
    if len(rates) < 2 or len(rates) - asked >= _MOST_STEPS:
        return []
    place = means.index(max(means))
    if place == 0:
        return [_rounded(rates[0] * rates[0] / rates[1])]
    return [_rounded(rates[-1] * rates[-1] / rates[-2])] if place == len(rates) - 1 else []


def _near(rates: Sequence[float], rate: float) -> float:
    """The rate of the sweep that is close to this one, else this one."""
    close = [each for each in rates if rate / _SAME < each < rate * _SAME]
    return min(close, key=lambda each: abs(each - rate), default=_rounded(rate))


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")
