"""Arms at their own best rates, on fresh seeds and a split that chose nothing: tests, and how soon and how safely.

Tests are paired by seed. Student's t on the differences (scipy's `ttest_rel`), and the exact test that flips their
signs in every way (Fisher, The Design of Experiments, 1935, section 21), which assumes no distribution. Holm's
correction (Scandinavian Journal of Statistics 6, 1979) is over the arms of the comparison, each against its baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from equalize.commands.compare.statistics import Cell, Difference, bootstrap, difference

Curve = Sequence[tuple[float, float]]
"""(step, mIoU), by step."""

_EXACT = 14  # pairs; of more, a random part of the sign flips is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """An arm on the third split, and against its baseline, each at its own best rate."""

    arm: str
    lr: float
    scores: tuple[float, ...]
    """mIoU of the third split after the last step, a value a seed."""
    loss_at_tenth: float | None
    """What is lost, on the split that chose the rates, at a rate ten times below the best."""
    baseline: str | None = None
    """None for the baseline itself, as everything below."""
    difference: Difference | None = None
    p: Mapping[str, float] | None = None
    """p values: t and sign flips, one-sided (the arm is better) and two-sided; None for one seed."""
    holm: Mapping[str, float] | None = None
    """The same, corrected for the number of arms."""
    steps_to_baseline: float | None = None
    """Where the mean curve of the arm first reaches the baseline's last mean score, between two evaluations by a
    straight line; None if it never does."""


def p_values(differences: Sequence[float]) -> dict[str, float]:
    """Of paired differences, two or more, whose mean is 0 if there is no effect."""
    found = {}
    values = np.asarray(differences, dtype=np.float64)
    for sides, alternative in (("one_sided", "greater"), ("two_sided", "two-sided")):
        if np.ptp(values) == 0:  # no spread: t is 0/0 or infinite
            p = 1.0 if values[0] == 0 else float(alternative == "greater" and values[0] < 0)
            found[f"t_{sides}"] = p
        else:
            found[f"t_{sides}"] = float(stats.ttest_1samp(values, 0.0, alternative=alternative).pvalue)
        flips = stats.permutation_test(
            (values,),
            np.mean,
            permutation_type="samples",
            n_resamples=2 ** min(len(values), _EXACT),
            alternative=alternative,
            vectorized=True,
            rng=np.random.default_rng(0),
        )
        found[f"sign_flip_{sides}"] = float(flips.pvalue)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    found: list[float] = adjusted.tolist()
    return found


def steps_to_reach(curve: Curve, score: float) -> float | None:
    """The step at which a curve first reaches a score."""
    before = None
    for step, value in curve:
        if value >= score:
            if before is None:
                return float(step)
            return float(before[0] + (step - before[0]) * (score - before[1]) / (value - before[1]))
        before = (step, value)
    return None


def confirm(
    cells: Mapping[str, Cell],
    curves: Mapping[str, Curve],
    rates: Mapping[str, float],
    losses: Mapping[str, float | None],
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
) -> list[Confirmed]:
    """The arms, those without a baseline first; one with two baselines has two rows.

    Args:
        cells: the scores of each arm on the third split, paired by seed.
        curves: of each arm, mean over seeds, on the split that chose the rates.
        rates: the best ones. losses: see `Confirmed.loss_at_tenth`. pairs: (arm, baseline).
    """
    compared = {arm for arm, _ in pairs}
    rows = [
        Confirmed(arm=arm, lr=rates[arm], scores=cell.final, loss_at_tenth=losses[arm])
        for arm, cell in cells.items()
        if arm not in compared
    ]
    found = [
        difference(cells[x].final, cells[y].final, bootstrap(cells[x].counts_S2NK, cells[y].counts_S2NK, seed=seed))
        for x, y in pairs
    ]
    tests = [p_values(each.pairs) for each in found if len(each.pairs) > 1]
    corrected = {name: holm([each[name] for each in tests]) for name in tests[0]} if tests else {}
    for number, (arm, baseline) in enumerate(pairs):
        rows.append(
            Confirmed(
                arm=arm,
                lr=rates[arm],
                scores=cells[arm].final,
                loss_at_tenth=losses[arm],
                baseline=baseline,
                difference=found[number],
                p=tests[number] if tests else None,
                holm={name: values[number] for name, values in corrected.items()} if tests else None,
                steps_to_baseline=steps_to_reach(curves[arm], curves[baseline][-1][1]),
            )
        )
    return rows
