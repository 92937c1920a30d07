import numpy as np
import pytest
import torch

from equalize.commands.compare.statistics import Cell, bootstrap, compare_arms, conclusion, difference, mean_iou
from equalize.metrics import count_pixels, score_of


def test_the_interval_of_pairs_done_by_hand():
    found = difference([50.0, 52.0, 51.0], [49.0, 49.0, 49.0])
    assert found.pairs == (1.0, 3.0, 2.0)
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert not found.measurable


def test_pairing_takes_away_what_seeds_share():
    shared = np.array([30.0, 45.0, 60.0, 38.0])
    found = difference(tuple(shared + np.array([1.0, 1.1, 0.9, 1.0])), tuple(shared))
    assert found.measurable


def test_one_seed_has_no_interval():
    found = difference([80.0], [20.0], images=(50.0, 70.0))
    assert (found.mean, found.low, found.high) == (60.0, None, None)
    assert not found.measurable


def test_the_verdict_rests_on_the_interval_over_seeds_alone():
    for images in ((0.5, 1.5), (-0.1, 1.5), None):
        assert difference([2.0, 2.1, 1.9], [1.0, 1.0, 1.0], images).measurable
    assert not difference([2.0, 3.9, 1.0], [1.0, 1.0, 1.0], images=(0.5, 1.5)).measurable


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ((1.0, 1.1, 0.9), "better"),
        ((0.1, -0.1, 0.05), "no measurable difference"),  # 4.303 * 0.104 / sqrt(3) = 0.26, below half a point
        # 4.303 * 1 / sqrt(3) = 2.48; 18 seeds: 2.110 / sqrt(18) = 0.497, 17 seeds: 2.120 / sqrt(17) = 0.514
        ((-1.0, 1.0, 0.0), "too few seeds to tell (about 18 would show 0.5 mIoU)"),
        ((1.0, 1.0001), "too few seeds to tell (about 3 would show 0.5 mIoU)"),  # though 0 lies outside
        ((5.0,), "too few seeds to tell (one says nothing of another)"),
        ((99.0, -99.0, 0.0), "too few seeds to tell (1000 or more would show 0.5 mIoU)"),
    ],
)
def test_a_wide_interval_says_that_there_are_too_few_seeds(pairs, said):
    found = difference(pairs, [0.0] * len(pairs))
    assert conclusion(found) == said
    assert found.tells == ("too few" not in said)


@pytest.mark.slow
def test_where_there_is_no_difference_one_in_twenty_is_found():
    random = np.random.default_rng(3)
    found = [difference(*random.normal(50, 2, (2, 4)).tolist()).measurable for _ in range(600)]
    assert 0.03 < np.mean(found) < 0.07


def counts(random, quality, seeds=3, images=40, classes=5):
    """(S, 2, N, K): intersections that are `quality` of random unions."""
    union = random.integers(0, 500, (seeds, images, classes)) * (random.random((seeds, images, classes)) < 0.7)
    union = np.broadcast_to(union[:1], union.shape)  # the labels are the same for every seed
    return np.stack([random.binomial(union, quality), union], axis=1).astype(np.int64)


def test_miou_is_that_of_the_score():
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([count_pixels(*torch.randint(0, 5, (2, 9, 7), generator=generator), 6) for _ in range(4)])
    each = counts.numpy()
    intersection = np.diagonal(each, axis1=1, axis2=2)
    union = each.sum(axis=1) + each.sum(axis=2) - intersection
    assert union[:, 5].sum() == 0
    assert mean_iou(np.stack([intersection, union]).sum(axis=1).astype(float)) == pytest.approx(
        score_of(counts.sum(0), 4).mIoU
    )


def test_bootstrap_agrees_with_drawing_images_one_by_one():
    random = np.random.default_rng(1)
    arm, baseline = counts(random, 0.6), counts(random, 0.5)
    low, high = bootstrap(arm, baseline, seed=5)
    found = []
    for _ in range(1000):
        chosen = random.integers(0, 40, 40)
        summed = [
            [each[:, chosen].sum(axis=1).astype(float) for each in counts_S2NK] for counts_S2NK in (arm, baseline)
        ]
        found.append(np.mean([mean_iou(a_2K) - mean_iou(b_2K) for a_2K, b_2K in zip(*summed, strict=True)]))
    spread = np.std(found)
    assert low == pytest.approx(np.quantile(found, 0.025), abs=spread / 4)
    assert high == pytest.approx(np.quantile(found, 0.975), abs=spread / 4)
    assert bootstrap(arm, baseline, seed=5) == (low, high)


def test_one_image_has_no_interval():
    random = np.random.default_rng(2)
    assert bootstrap(counts(random, 0.6, images=1), counts(random, 0.5, images=1)) is None


def test_a_class_that_no_drawn_image_shows_does_not_count():
    counts_2K = np.array([[[5.0, 0.0], [0.0, 0.0]], [[10.0, 0.0], [0.0, 0.0]]])
    assert mean_iou(counts_2K).tolist() == [50.0, 0.0]


def cell(random, finals, early, quality):
    return Cell(final=tuple(finals), early=tuple(early), counts_S2NK=counts(random, quality))


def sweep(random, scores):
    """Cells of {(arm, rate): (mean final, mean early)} with small noise that the arms don't share."""
    return {
        key: cell(random, final + random.normal(0, 0.05, 3), early + random.normal(0, 0.05, 3), final / 100)
        for key, (final, early) in scores.items()
    }


def answers(verdict):
    return verdict.best, verdict.sweep, verdict.early


def test_planted_differences_are_found_by_each_question():
    random = np.random.default_rng(8)
    scores = {
        ("none", 1e-4): (60, 30),
        ("none", 1e-3): (64, 20),
        ("none", 1e-2): (50, 10),
        ("rescale", 1e-4): (62, 38),
        ("rescale", 1e-3): (66, 28),
        ("rescale", 1e-2): (67, 12),
    }
    rows, (verdict,) = compare_arms(
        sweep(random, scores), [("rescale", "none")], (1e-4, 1e-3, 1e-2), early="10 of 100 steps"
    )
    assert [round(row.difference.mean) for row in rows] == [2, 2, 17]
    assert [round(row.early.mean) for row in rows] == [8, 8, 2]
    assert verdict.best.lr == 1e-2
    assert verdict.best.baseline_lr == 1e-3
    assert verdict.best.difference.mean == pytest.approx(3, abs=0.2)
    assert verdict.best.sentence.startswith("each at its best rate (0.01 and 0.001): +3.0")
    assert verdict.best.sentence.endswith(": better")
    assert verdict.sweep.lr == 1e-4
    assert verdict.sweep.baseline_lr == 1e-2
    assert verdict.sweep.difference.mean == pytest.approx(14 - 5, abs=0.3)
    assert verdict.sweep.sentence.endswith(": less is lost")
    assert verdict.early.lr == verdict.early.baseline_lr == 1e-3
    assert verdict.early.difference.mean == pytest.approx(8, abs=0.2)
    assert "after 10 of 100 steps" in verdict.early.sentence
    assert verdict.early.sentence.endswith(": ahead")


def test_none_is_found_where_there_is_none():
    random = np.random.default_rng(9)
    scores = {(arm, rate): (60, 30) for arm in ("none", "migrate") for rate in (1e-4, 1e-3)}
    _, (verdict,) = compare_arms(sweep(random, scores), [("migrate", "none")], (1e-4, 1e-3), early="")
    for answer in answers(verdict):
        assert answer.sentence.endswith("no measurable difference")


def test_worse_is_said_as_well():
    random = np.random.default_rng(10)
    scores = {("none", 0.1): (60, 30), ("none", 1.0): (59, 30), ("reinit", 0.1): (50, 20), ("reinit", 1.0): (20, 10)}
    _, (verdict,) = compare_arms(sweep(random, scores), [("reinit", "none")], (0.1, 1.0), early="")
    assert [answer.sentence.rpartition(": ")[2] for answer in answers(verdict)] == [
        "worse",
        "more is lost",
        "behind",
    ]


def test_one_rate_asks_no_question_about_bad_ones():
    random = np.random.default_rng(11)
    scores = {("none", 0.1): (60, 30), ("rescale", 0.1): (60, 30)}
    _, (verdict,) = compare_arms(sweep(random, scores), [("rescale", "none")], (0.1,), early="")
    assert verdict.sweep.difference is None
    assert "--lrs" in verdict.sweep.sentence
    assert verdict.best.sentence.startswith("at rate 0.1: ")


def test_one_seed_is_no_proof():
    random = np.random.default_rng(12)
    cells = {
        ("none", 0.1): Cell(final=(20.0,), early=(1.0,), counts_S2NK=counts(random, 0.2, seeds=1)),
        ("rescale", 0.1): Cell(final=(90.0,), early=(50.0,), counts_S2NK=counts(random, 0.9, seeds=1)),
    }
    _, (verdict,) = compare_arms(cells, [("rescale", "none")], (0.1,), early="")
    assert verdict.best.difference.images[0] > 50
    assert verdict.best.sentence.endswith("too few seeds to tell (one says nothing of another)")
