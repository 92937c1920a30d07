"""The metric against a plain loop over classes in numpy, written from the definitions."""

import json

import numpy as np
import pytest
import torch

from equalize.metrics import Score, count_pixels, score_of

IGNORED = 255


def oracle(prediction: np.ndarray, label: np.ndarray, classes: int) -> tuple[list[float], list[float], float]:
    """IoU and Acc of each class (nan for 0 / 0) and aAcc, from sets of pixels."""
    valid = label != IGNORED
    ious, accs = [], []
    for k in range(classes):
        predicted, labeled = valid & (prediction == k), valid & (label == k)
        with np.errstate(invalid="ignore"):
            ious.append(np.float64((predicted & labeled).sum()) / (predicted | labeled).sum() * 100)
            accs.append(np.float64((predicted & labeled).sum()) / labeled.sum() * 100)
    return ious, accs, (prediction == label)[valid].mean() * 100


def same(found: list[float | None], expected: list[float]) -> None:
    assert [value is None for value in found] == [np.isnan(value) for value in expected]
    np.testing.assert_allclose([np.nan if value is None else value for value in found], expected, rtol=1e-12)


def random_images(seed: int, classes: int, drawn_labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    label = random.choice([*drawn_labels, IGNORED], (6, 9, 11))
    prediction = np.where(random.random(label.shape) < 0.5, label, random.integers(0, classes - 2, label.shape))
    return np.where(prediction == IGNORED, 0, prediction), label


@pytest.mark.parametrize("seed", range(5))
def test_score_equals_the_oracle(seed: int) -> None:
    """Of 7 classes, 1 is never labeled but predicted, 5 is labeled and predicted only where right, 6 is absent."""
    prediction, label = random_images(seed, 7, [0, 2, 3, 4, 5])
    parts = ((0, 1), (1, 4), (4, 6))
    counts = [
        count_pixels(torch.from_numpy(prediction[start:stop]), torch.from_numpy(label[start:stop]), 7)
        for start, stop in parts
    ]
    score = score_of(sum(counts), 6)
    ious, accs, overall = oracle(prediction, label, 7)
    same([row.IoU for row in score.classes], ious)
    same([row.Acc for row in score.classes], accs)
    same([score.mIoU, score.mAcc, score.aAcc], [np.nanmean(ious), np.nanmean(accs), overall])
    assert [row.pixels for row in score.classes] == [(label == k).sum() for k in range(7)]
    assert (score.classes[1].IoU, score.classes[1].Acc) == (0.0, None)
    assert (score.classes[6].IoU, score.classes[6].Acc) == (None, None)
    assert score.images == 6


def test_by_hand() -> None:
    label = torch.tensor([[0, 0, 0, 1], [1, 1, IGNORED, IGNORED]])
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1]])
    counts_KK = count_pixels(prediction, label, 3)
    assert counts_KK.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    score = score_of(counts_KK, 1, ["road", "sky", "car"])
    assert (score.mIoU, score.mAcc, score.aAcc) == pytest.approx((50.0, 200 / 3, 200 / 3))
    assert score.to_json() == {
        "mIoU": 50.0,
        "mAcc": pytest.approx(200 / 3),
        "aAcc": pytest.approx(200 / 3),
        "classes": [
            {"id": 0, "name": "road", "IoU": 50.0, "Acc": pytest.approx(200 / 3), "pixels": 3},
            {"id": 1, "name": "sky", "IoU": 50.0, "Acc": pytest.approx(200 / 3), "pixels": 3},
            {"id": 2, "name": "car", "IoU": None, "Acc": None, "pixels": 0},
        ],
        "images": 1,
    }
    json.dumps(score.to_json(), allow_nan=False)


def test_nothing_scored_is_none() -> None:
    label = torch.full((2, 2), IGNORED, dtype=torch.uint8)
    score = score_of(count_pixels(torch.zeros(2, 2, dtype=torch.uint8), label, 2), 1)
    assert isinstance(score, Score)
    assert (score.mIoU, score.mAcc, score.aAcc, score.images) == (None, None, None, 1)


def test_an_ignored_class_counts_nowhere() -> None:
    counts_KK = count_pixels(torch.tensor([[1, 1]]), torch.tensor([[0, 1]]), 2, ignore_index=0)
    assert counts_KK.tolist() == [[0, 0], [0, 1]]


def test_a_class_that_is_left_out_has_no_score_and_takes_no_part_in_the_mean() -> None:
    counts_KK = torch.tensor([[0, 0, 0], [2, 6, 0], [0, 0, 4]])  # two pixels of class 1 taken for class 0
    score = score_of(counts_KK, 1, left_out=0)
    assert [row.IoU for row in score.classes] == [None, 75.0, 100.0]
    assert (score.mIoU, score.aAcc) == (87.5, pytest.approx(100 * 10 / 12))
