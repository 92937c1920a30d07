"""Paired differences between trainings, with confidence intervals; on plain numbers and arrays.

There are two sources of chance. Over seeds: another draw of weights, order and augmentations; Student's t on the
pairs. Over images: another validation set for the networks that were trained; the percentile bootstrap (Efron &
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13), with the same images for both arms and all seeds.

Three questions are answered for every arm and its baseline:

best     each at its own best rate: how much better?
sweep    from its best to its worst rate each loses something: how much less than the baseline?
early    after the first tenth of training, both at the baseline's best rate: how far ahead?

The answers rest on the interval over seeds alone, that over images is only reported: a training with another seed is
what a reader would run. There is a difference if 0 lies outside; "no measurable difference" if the interval is narrow
enough (half width up to 0.5 mIoU) that one worth having would have shown; else, and of one or two seeds always, "too
few seeds to tell".

Best and worst are by mean mIoU over seeds. Intervals are not corrected for how many arms and rates are compared: of
twenty comparisons of equals one falls outside its interval over seeds.

S seeds, N images, K classes; counts_S2NK holds intersection and union in pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_RESAMPLES = 2000
_BATCH = 250  # resamples that are in memory at a time
_FEWEST = 3  # seeds of a verdict: the spread of two is not known well enough for any
_WORTH = 0.5  # mIoU that must show if it is there; the paper reports 0.1 to 0.4, trials of one data set up to a few
_MOST = 1000  # seeds; of more, nobody needs the number

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An arm less its baseline, in percentage points of mIoU."""

    mean: float
    """Mean over seeds."""
    pairs: tuple[float, ...]
    """The difference for each seed."""
    low: float | None = None
    high: float | None = None
    """95 % interval of the mean over seeds; None for one seed."""
    images: Interval | None = None
    """95 % interval of the mean over images; None for one image, or where images were not counted."""
    measurable: bool = False
    """Whether 0 lies outside of the interval over three or more seeds."""
    seeds_needed: int | None = None
    """About how many seeds would tell, at the spread of these; None where they do, or their spread is unknown."""

    @property
    def tells(self) -> bool:
        """Whether the seeds suffice for an answer."""
        if self.measurable:
            return True
        return len(self.pairs) >= _FEWEST and self.seeds_needed is None


def difference(arm: Sequence[float], baseline: Sequence[float], images: Interval | None = None) -> Difference:
    """The difference of mIoUs, a value a seed in the same order; `images` is from `bootstrap`."""
    pairs = tuple(one - other for one, other in zip(arm, baseline, strict=True))
    mean = math.fsum(pairs) / len(pairs)
    if len(pairs) == 1:
        return Difference(mean=mean, pairs=pairs, images=images)
    error = float(stats.sem(pairs))
    half = _half_width(error, len(pairs))
    low, high = mean - half, mean + half
    measurable = len(pairs) >= _FEWEST and (low > 0 or high < 0)
    needed = None if measurable else _seeds_needed(error * math.sqrt(len(pairs)), len(pairs))
    return Difference(
        mean=mean, pairs=pairs, low=low, high=high, images=images, measurable=measurable, seeds_needed=needed
    )


def _half_width(error: float, seeds: int) -> float:
    """Of the 95 % interval of a mean with this standard error."""
    return float(stats.t.ppf(0.975, seeds - 1)) * error


def _seeds_needed(deviation: float, seeds: int) -> int | None:
    """The smallest number of seeds whose interval is narrow enough; None if `seeds` are that many."""
    enough = range(_FEWEST, _MOST)
    needed = next((n for n in enough if _half_width(deviation / math.sqrt(n), n) <= _WORTH), _MOST)
    return needed if needed > seeds else None


def mean_iou(counts_2K: NDArray[np.float64]) -> NDArray[np.float64]:
    """mIoU in percent, (...), of counts (2, ..., K); classes in no label and no prediction do not count."""
    intersection, union = counts_2K
    present = union > 0
    iou = np.divide(intersection, union, out=np.zeros_like(union), where=present)
    mean: NDArray[np.float64] = 100 * iou.sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)
    return mean


def bootstrap(arm_S2NK: NDArray[np.int64], baseline_S2NK: NDArray[np.int64], *, seed: int = 0) -> Interval | None:
    """95 % interval over images of the mean over seeds of mIoU(arm) - mIoU(baseline); None for one image.

    Counts are of the same images, paired by seed; `seed` is of the sets of N images that are drawn, with repetition.
    """
    images = arm_S2NK.shape[2]
    if images < 2:
        return None
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(arm_S2NK, baseline_S2NK, strict=True)]

    def mean_difference(drawn_BN: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        times_BN = np.apply_along_axis(np.bincount, axis, drawn_BN, minlength=images).astype(np.float64)
        differences = [mean_iou(times_BN @ a_2NK) - mean_iou(times_BN @ b_2NK) for a_2NK, b_2NK in pairs]
        mean: NDArray[np.float64] = np.mean(differences, axis=0)
        return mean

    low, high = stats.bootstrap(
        (np.arange(images),),
        mean_difference,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The runs of one arm at one rate."""

    final: tuple[float, ...]
    """mIoU after the last step, a value a seed; `early` after the first tenth."""
    early: tuple[float, ...]
    counts_S2NK: NDArray[np.int64]
    """Of the final scores."""

    @property
    def mean(self) -> float:
        """Final mIoU, over seeds."""
        return sum(self.final) / len(self.final)


Cells = Mapping[tuple[str, float], Cell]
"""By arm and rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An arm against its baseline at the same rate: after the last step, and after the first tenth."""

    arm: str
    baseline: str
    lr: float
    difference: Difference
    early: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To one of the questions."""

    sentence: str
    """Ends with what is concluded, such as "better", "no measurable difference" or "too few seeds to tell"."""
    difference: Difference | None = None
    """None where the data do not allow an answer."""
    lr: float | None = None
    """The arm's rate, as `baseline_lr` the baseline's; for the sweep the worst ones."""
    baseline_lr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answers to the three questions for one arm."""

    arm: str
    baseline: str
    best: Answer
    sweep: Answer
    early: Answer


def compare_arms(
    cells: Cells, pairs: Sequence[tuple[str, str]], rates: Sequence[float], *, early: str, seed: int = 0
) -> tuple[list[Row], list[Verdict]]:
    """Every difference, and the verdict on every arm; `pairs` are (arm, baseline).

    `early` is what the first tenth was, such as "10 of 100 steps"; `seed` of the bootstrap.
    """
    rows = [
        Row(
            arm=arm,
            baseline=baseline,
            lr=rate,
            difference=_final(cells[arm, rate], cells[baseline, rate], seed),
            early=difference(cells[arm, rate].early, cells[baseline, rate].early),
        )
        for arm, baseline in pairs
        for rate in rates
    ]
    return rows, [_verdict(cells, arm, baseline, rates, early, seed) for arm, baseline in pairs]


def _final(arm: Cell, baseline: Cell, seed: int) -> Difference:
    return difference(arm.final, baseline.final, bootstrap(arm.counts_S2NK, baseline.counts_S2NK, seed=seed))


def _verdict(cells: Cells, arm: str, baseline: str, rates: Sequence[float], early: str, seed: int) -> Verdict:
    ranked = {name: sorted(rates, key=lambda rate: cells[name, rate].mean) for name in (arm, baseline)}
    own, base = ranked[arm][-1], ranked[baseline][-1]
    final = _final(cells[arm, own], cells[baseline, base], seed)
    ahead = difference(cells[arm, base].early, cells[baseline, base].early)
    if len(rates) == 1:
        each = both = f"at rate {base:g}"
        sweep = Answer(
            sentence="only one learning rate was tried; --lrs with several shows how each arm takes a bad one"
        )
    else:
        each = f"each at its best rate ({own:g} and {base:g})"
        both = f"at the baseline's best rate {base:g}"
        sweep = _sweep(cells, ranked)
    best = f"{each}: {in_words(final)}"
    first = f"after {early} {both}: {in_words(ahead, 'ahead', 'behind')}"
    return Verdict(
        arm=arm,
        baseline=baseline,
        best=Answer(sentence=best, difference=final, lr=own, baseline_lr=base),
        sweep=sweep,
        early=Answer(sentence=first, difference=ahead, lr=base, baseline_lr=base),
    )


def _sweep(cells: Cells, ranked: Mapping[str, Sequence[float]]) -> Answer:
    """What an arm loses less than its baseline, of rates from the worst to the best."""
    (arm, own), (baseline, base) = ((name, rates[0]) for name, rates in ranked.items())
    lost, lost_base = (
        difference(cells[name, rates[-1]].final, cells[name, rates[0]].final) for name, rates in ranked.items()
    )
    saved = difference(lost_base.pairs, lost.pairs)
    sentence = (
        f"from its best rate to its worst ({own:g} and {base:g}) {arm} loses {lost.mean:.2f}, {baseline} "
        f"{lost_base.mean:.2f}: {in_words(saved, 'less is lost', 'more is lost')}"
    )
    return Answer(sentence=sentence, difference=saved, lr=own, baseline_lr=base)


def in_words(found: Difference, more: str = "better", less: str = "worse") -> str:
    """`+0.52 mIoU, ...: better`, or no measurable difference, or too few seeds."""
    facts = [f"{found.mean:+.2f} mIoU"]
    if found.low is not None and found.high is not None:
        facts.append(f"95 % over {len(found.pairs)} seeds {found.low:+.2f} to {found.high:+.2f}")
    return f"{', '.join(facts)}: {conclusion(found, more, less)}"


def conclusion(found: Difference, more: str = "better", less: str = "worse") -> str:
    """What the interval over seeds says: more, less, nothing to measure, or that there are too few seeds."""
    if found.measurable:
        return more if found.mean > 0 else less
    if found.tells:
        return "no measurable difference"
    if len(found.pairs) == 1:
        return "too few seeds to tell (one says nothing of another)"
    about = f"{_MOST} or more" if found.seeds_needed == _MOST else f"about {found.seeds_needed or _FEWEST}"
    return f"too few seeds to tell ({about} would show {_WORTH:g} mIoU)"
