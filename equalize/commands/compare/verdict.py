"""What the runs of a comparison say: differences at every rate, and three questions with a sentence each.

best     each arm at its own best rate: how much better?
sweep    from its best to its worst rate each arm loses something: how much less than the baseline?
early    after the first tenth of training, both at the baseline's best rate: how far ahead?

Best and worst are by mean mIoU over seeds, of the baseline as of the arms. Intervals are not corrected for how many
arms and rates are compared: of twenty comparisons of equals one falls outside its interval over seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equalize.commands.compare.statistics import Difference, bootstrap, difference

__all__ = ["Answer", "Cell", "Row", "Verdict", "judge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The runs of one arm at one rate.

    Attributes:
        final, early: mIoU after the last step, and after the first tenth, a value a seed.
        counts_S2NK: of the final scores, see `statistics`.
    """

    final: tuple[float, ...]
    early: tuple[float, ...]
    counts_S2NK: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Final mIoU, over seeds."""
        return sum(self.final) / len(self.final)


Cells = Mapping[tuple[str, float], Cell]
"""By arm and rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An arm against its baseline at the same rate."""

    arm: str
    baseline: str
    rate: float
    final: Difference
    early: Difference

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "arm": self.arm,
            "baseline": self.baseline,
            "lr": self.rate,
            "difference": self.final.to_json(),
            "early": self.early.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To one of the questions.

    Attributes:
        rates: the arm's and the baseline's; for the sweep the worst ones.
        difference: None where the question cannot be asked.
        sentence: the answer in words; "no measurable difference" unless it is measurable.
    """

    rates: tuple[float, float] | None
    difference: Difference | None
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "lr": self.rates[0] if self.rates else None,
            "baseline_lr": self.rates[1] if self.rates else None,
            "difference": self.difference.to_json() if self.difference else None,
            "sentence": self.sentence,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The three answers for one arm."""

    arm: str
    baseline: str
    best: Answer
    sweep: Answer
    early: Answer

    @property
    def answers(self) -> dict[str, Answer]:
        """By question."""
        return {"best": self.best, "sweep": self.sweep, "early": self.early}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        answers = {question: answer.to_json() for question, answer in self.answers.items()}
        return {"arm": self.arm, "baseline": self.baseline, **answers}


def judge(
    cells: Cells, pairs: Sequence[tuple[str, str]], rates: Sequence[float], *, early: str = "", seed: int = 0
) -> tuple[list[Row], list[Verdict]]:
    """Every difference, and the verdict on every arm.

    Args:
        cells: the runs.
        pairs: (arm, baseline).
        rates: of the sweep.
        early: what the first tenth was, such as "10 of 100 steps".
        seed: of the bootstrap.
    """
    rows = [
        Row(
            arm=arm,
            baseline=baseline,
            rate=rate,
            final=_final(cells[arm, rate], cells[baseline, rate], seed),
            early=difference(cells[arm, rate].early, cells[baseline, rate].early),
        )
        for arm, baseline in pairs
        for rate in rates
    ]
    return rows, [_verdict(cells, pair, rates, early, seed) for pair in pairs]


def _final(arm: Cell, baseline: Cell, seed: int) -> Difference:
    return difference(arm.final, baseline.final, bootstrap(arm.counts_S2NK, baseline.counts_S2NK, seed=seed))


def _verdict(cells: Cells, pair: tuple[str, str], rates: Sequence[float], early: str, seed: int) -> Verdict:
    arm, baseline = pair
    best = {each: max(rates, key=lambda rate: cells[each, rate].mean) for each in pair}
    at_best = _final(cells[arm, best[arm]], cells[baseline, best[baseline]], seed)
    ahead = difference(cells[arm, best[baseline]].early, cells[baseline, best[baseline]].early)
    where = f"at the baseline's best rate {best[baseline]:g}" if len(rates) > 1 else f"at rate {rates[0]:g}"
    own = f"each at its best rate ({best[arm]:g} and {best[baseline]:g})" if len(rates) > 1 else f"at rate {rates[0]:g}"
    return Verdict(
        arm=arm,
        baseline=baseline,
        best=Answer(
            rates=(best[arm], best[baseline]),
            difference=at_best,
            sentence=f"{own}: {_words(at_best, 'better', 'worse')}",
        ),
        sweep=_sweep(cells, pair, rates, best),
        early=Answer(
            rates=(best[baseline], best[baseline]),
            difference=ahead,
            sentence=f"after {early or 'the first tenth of training'} {where}: {_words(ahead, 'ahead', 'behind')}",
        ),
    )


def _sweep(cells: Cells, pair: tuple[str, str], rates: Sequence[float], best: Mapping[str, float]) -> Answer:
    if len(rates) == 1:
        return Answer(rates=None, difference=None, sentence="one rate was tried, so a bad one is not known; see --lrs")
    worst = {each: min(rates, key=lambda rate: cells[each, rate].mean) for each in pair}
    lost = [
        [top - low for top, low in zip(cells[each, best[each]].final, cells[each, worst[each]].final, strict=True)]
        for each in pair
    ]
    saved = difference(lost[1], lost[0])
    rate_by_rate = f"from its best rate to its worst ({worst[pair[0]]:g} and {worst[pair[1]]:g})"
    means = [sum(values) / len(values) for values in lost]
    words = _words(saved, "less is lost", "more is lost")
    sentence = f"{rate_by_rate} {pair[0]} loses {means[0]:.2f}, {pair[1]} {means[1]:.2f}: {words}"
    return Answer(rates=(worst[pair[0]], worst[pair[1]]), difference=saved, sentence=sentence)


def _words(found: Difference, more: str, less: str) -> str:
    """`+0.52 mIoU, ...: better`, or no measurable difference."""
    count = len(found.pairs)
    facts = [f"{found.mean:+.2f} mIoU"]
    if found.low is not None and found.high is not None:
        facts.append(f"95 % over {count} seeds {found.low:+.2f} to {found.high:+.2f}")
    if found.images:
        facts.append(f"over images {found.images[0]:+.2f} to {found.images[1]:+.2f}")
    if found.measurable:
        conclusion = more if found.mean > 0 else less
    elif count == 1:
        conclusion = "no measurable difference, for one seed says nothing of another"
    else:
        conclusion = "no measurable difference"
    return f"{', '.join(facts)}: {conclusion}"
