"""What a comparison found, as pictures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from equalize.commands.compare.arms import baselines
from equalize.commands.compare.compare import Comparison
from equalize.commands.compare.statistics import difference, in_words
from equalize.commands.report.comparison import (
    Estimate,
    draw_class_differences,
    draw_confirmed,
    draw_learning_curves,
    draw_rates,
)
from equalize.commands.report.style import Picture

_ENOUGH = 3  # seeds for an interval: that of two is 13 times their standard error

_Results = Sequence[Mapping[str, Any]]


def draw_comparison(found: Comparison) -> tuple[Picture, ...]:
    """mIoU against the rate, learning curves, what the confirming runs scored, differences by class: what there is."""
    return tuple(_confirmation(found) if found.setup.test is not None else _comparison(found))


def _comparison(found: Comparison) -> Iterator[Picture]:
    setup, split = found.setup, found.setup.val.split or "val"
    title = [*(f"{each.arm} against {each.baseline}, {each.best.sentence}" for each in found.verdicts), _sigmas(found)]
    has_rates = len(setup.rates) > 1
    if has_rates:
        yield draw_rates(_by_rate(found), split=split, title=title)
    curves = {
        f"learning rate {rate:g}": {
            arm: [run["curve"] for run in found.results_of(arm, rate)] for arm in _baseline_first(found)
        }
        for rate in setup.rates
    }
    yield draw_learning_curves(curves, split=split, title=() if has_rates else title)
    differences = {}
    for verdict in found.verdicts:
        rates = verdict.best.lr, verdict.best.baseline_lr
        if rates[0] is not None and rates[1] is not None:
            mine, base = found.results_of(verdict.arm, rates[0]), found.results_of(verdict.baseline, rates[1])
            differences[f"{verdict.arm} against {verdict.baseline}"] = _by_class(mine, base)
    if any(differences.values()):
        yield draw_class_differences(differences)


def _confirmation(found: Comparison) -> Iterator[Picture]:
    """The sweeps on the split that chose the rates, and the confirming runs on the third."""
    setup = found.setup
    assert setup.test is not None
    val, test = setup.val.split or "val", setup.test.split or "test"
    order = _baseline_first(found)
    rows = {row.arm: row for row in reversed(found.confirmed)}  # of two baselines the first
    runs = {arm: found.results_of(arm, rows[arm].lr, confirming=True) for arm in order}
    title = [
        f"{row.arm} less {row.baseline} on {test}: {in_words(row.difference)}"
        for row in found.confirmed
        if row.difference is not None
    ]
    named = {f"{arm}, rate {rows[arm].lr:g}": _estimate(rows[arm].scores) for arm in order}
    yield draw_confirmed(named, split=test, title=[*title, _sigmas(found)])
    if max(len(each.rates) for each in found.tuned) > 1:
        seeds = len(setup.seeds)
        title = [f"The sweeps that chose the rates: {seeds} {'seeds' if seeds > 1 else 'seed'} on {val}"]
        yield draw_rates(_by_rate(found), split=val, title=title)
    curves = {arm: [run["curve"] for run in runs[arm]] for arm in order}
    yield draw_learning_curves({"each arm at its own best rate, fresh seeds": curves}, split=val)
    differences = {
        f"{row.arm} against {row.baseline}": _by_class(
            [run["test"] for run in runs[row.arm]], [run["test"] for run in runs[row.baseline]]
        )
        for row in found.confirmed
        if row.baseline is not None
    }
    if any(differences.values()):
        yield draw_class_differences(differences)


def _sigmas(found: Comparison) -> str:
    """Of the layer and seed where they are furthest apart: the largest over the smallest, as each arm's training saw
    them."""
    ratios: dict[str, float] = {}
    for result in found.results:
        for site in result["sites"]:
            ratios[result["arm"]] = max(site["ratio_after"], ratios.get(result["arm"], 0.0))
    seen = ", ".join(f"{ratios[arm]:.2f} {arm}" for arm in _baseline_first(found) if arm in ratios)
    return f"Largest sigma over smallest, as trained: {seen}" if seen else ""


def _baseline_first(found: Comparison) -> list[str]:
    arms = [arm.name for arm in found.setup.arms]
    compared = {arm for arm, _ in baselines(found.setup.arms)}
    return [*(arm for arm in arms if arm not in compared), *(arm for arm in arms if arm in compared)]


def _by_rate(found: Comparison) -> dict[str, dict[float, tuple[float, ...]]]:
    return {
        arm: {rate: cell.final for (name, rate), cell in found.cells.items() if name == arm}
        for arm in _baseline_first(found)
    }


def _by_class(arm: _Results, baseline: _Results) -> dict[str, Estimate]:
    """Differences of the IoU by class, paired by seed; without the classes that a run has no score of."""
    pairs = {
        name: [(one["IoU"][name], other["IoU"][name]) for one, other in zip(arm, baseline, strict=True)]
        for name in arm[0]["IoU"]
    }
    return {
        name: _estimate([one - other for one, other in each])
        for name, each in pairs.items()
        if all(None not in pair for pair in each)
    }


def _estimate(values: Sequence[float]) -> Estimate:
    if len(values) < _ENOUGH:
        return Estimate(values=tuple(values))
    found = difference(values, [0.0] * len(values))
    return Estimate(values=tuple(values), low=found.low, high=found.high)
