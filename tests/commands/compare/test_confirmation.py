import itertools

import numpy as np
import pytest
from scipy import stats

from equalize.commands.compare.confirmation import confirm, holm, p_values, steps_to_reach
from equalize.commands.compare.statistics import Cell

SCORES = ([50.1, 52.3, 49.0, 55.2, 51.7, 50.0, 53.3, 52.0], [49.0, 51.9, 49.5, 52.0, 50.1, 49.9, 50.0, 51.2])


def test_p_values_of_pairs():
    """Student's t from scipy's own test of pairs; sign flips counted one by one."""
    arm, base = SCORES
    differences = np.subtract(arm, base)
    found = p_values(differences)
    assert found["t_two_sided"] == pytest.approx(stats.ttest_rel(arm, base).pvalue)
    assert found["t_one_sided"] == pytest.approx(stats.ttest_rel(arm, base, alternative="greater").pvalue)
    means = [np.mean(signs * differences) for signs in itertools.product((1, -1), repeat=len(differences))]
    as_large = np.mean(np.array(means) >= differences.mean() - 1e-12)
    assert found["sign_flip_one_sided"] == pytest.approx(as_large)
    assert found["sign_flip_two_sided"] == pytest.approx(2 * as_large)


def test_differences_without_spread():
    assert p_values([0.0, 0.0, 0.0]) == dict.fromkeys(p_values([1.0, 2.0]), 1.0)
    better, worse = p_values([2.0, 2.0, 2.0]), p_values([-2.0, -2.0, -2.0])
    assert (better["t_one_sided"], worse["t_one_sided"]) == (0.0, 1.0)
    assert better["sign_flip_one_sided"] == 1 / 8


def test_holm_done_by_hand():
    """Smallest times 4, the next times 3, ..., never less than the one before, at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_holm_rejects_falsely_in_one_of_twenty_families():
    random = np.random.default_rng(0)
    found = [min(holm(random.uniform(size=6))) < 0.05 for _ in range(2000)]
    assert 0.035 < np.mean(found) < 0.065


@pytest.mark.parametrize(
    ("score", "step"), [(5.0, 20.0), (10.0, 20.0), (15.0, 30.0), (20.0, 40.0), (25.0, 70.0), (31.0, None)]
)
def test_where_a_curve_reaches_a_score(score, step):
    curve = [(20, 10.0), (40, 20.0), (60, 18.0), (80, 32.0 - 1.5)]
    if score == 25.0:
        step = 60 + 20 * (25 - 18) / (30.5 - 18)
    assert steps_to_reach(curve, score) == (None if step is None else pytest.approx(step))


def cell(scores) -> Cell:
    counts = np.ones((len(scores), 2, 3, 2), np.int64)
    return Cell(final=tuple(scores), early=tuple(scores), counts_S2NK=counts)


def test_every_arm_against_its_baseline():
    arm, base = SCORES
    cells = {"none": cell(base), "explicit": cell(arm), "paper": cell(np.array(base) - 0.5)}
    curves = {
        "none": [(50, 40.0), (100, 50.0)],
        "explicit": [(50, 50.0), (100, 60.0)],
        "paper": [(50, 1.0), (100, 2.0)],
    }
    rates = {"none": 1e-2, "explicit": 3e-3, "paper": 3e-2}
    rows = confirm(cells, curves, rates, dict.fromkeys(cells, 4.0), [("explicit", "none"), ("paper", "none")])
    assert [row.arm for row in rows] == ["none", "explicit", "paper"]
    none, explicit, paper = rows
    assert (none.baseline, none.difference, none.p) == (None, None, None)
    assert explicit.difference.mean == pytest.approx(np.mean(arm) - np.mean(base))
    assert (explicit.steps_to_baseline, paper.steps_to_baseline) == (50.0, None)
    assert explicit.holm["t_one_sided"] == pytest.approx(2 * explicit.p["t_one_sided"])  # the smaller of two
    assert paper.p["t_one_sided"] == 1.0


def test_one_seed_is_no_test():
    rows = confirm({"none": cell([1.0]), "a": cell([2.0])}, {"none": [(1, 1.0)], "a": [(1, 2.0)]},
                   {"none": 1.0, "a": 1.0}, {"none": None, "a": None}, [("a", "none")])  # fmt: skip
    assert rows[1].p is None
    assert rows[1].difference.low is None
