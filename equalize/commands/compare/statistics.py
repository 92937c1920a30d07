"""Is one training better than another: paired differences with intervals. Plain numbers in, plain numbers out.

Two sources of chance are told apart. Over seeds: another draw of weights, order and augmentations; Student's t on the
pairs. Over images: another validation set for the networks that were trained; the percentile bootstrap (Efron &
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13), with the same images for both arms and all seeds.

S seeds, N images, K classes; counts_S2NK holds intersection and union in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Difference", "bootstrap", "difference", "mean_iou", "student_t"]

_DRAWS = 2000
_BLOCK = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An arm less its baseline, in percentage points of mIoU.

    Attributes:
        mean: over seeds.
        pairs: of each seed.
        low, high: 95 % interval of the mean over seeds; None for one seed.
        images: 95 % interval of the mean over images; None where images were not counted.
    """

    mean: float
    pairs: tuple[float, ...]
    low: float | None
    high: float | None
    images: tuple[float, float] | None = None

    @property
    def measurable(self) -> bool:
        """Whether 0 lies outside of every interval; never with one seed, which says nothing of another."""
        if self.low is None or self.high is None:
            return False
        return all(low > 0 or high < 0 for low, high in ((self.low, self.high), self.images or (self.low, self.high)))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        images = list(self.images) if self.images else None
        return asdict(self) | {"pairs": list(self.pairs), "images": images, "measurable": self.measurable}


def difference(
    arm: Sequence[float], baseline: Sequence[float], images: tuple[float, float] | None = None
) -> Difference:
    """The difference of scores that are paired by seed.

    Args:
        arm, baseline: mIoU, a value a seed, in the same order.
        images: from `bootstrap`.
    """
    assert len(arm) == len(baseline) > 0
    pairs = tuple(one - other for one, other in zip(arm, baseline, strict=True))
    mean = math.fsum(pairs) / len(pairs)
    if len(pairs) == 1:
        return Difference(mean=mean, pairs=pairs, low=None, high=None, images=images)
    variance = math.fsum((pair - mean) ** 2 for pair in pairs) / (len(pairs) - 1)
    half = student_t(len(pairs) - 1) * math.sqrt(variance / len(pairs))
    return Difference(mean=mean, pairs=pairs, low=mean - half, high=mean + half, images=images)


def student_t(freedom: int) -> float:
    """The value that Student's t exceeds in absolute size with probability 5 %, for whole degrees of freedom."""
    low, high = 0.0, 100.0  # 12.7 is the largest, for one degree
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t): Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):  # the term after this has the exponent of cosine two higher
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def mean_iou(counts_2NK: NDArray[np.int64]) -> float:
    """mIoU in percent over all images; a class that is in no label and no prediction does not count."""
    return float(_mean_iou(counts_2NK.sum(axis=1).astype(np.float64)))


def _mean_iou(counts_2K: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, ..., K) -> (...): the mean over classes that are there."""
    intersection, union = counts_2K
    there = union > 0
    iou = np.divide(intersection, union, out=np.zeros_like(intersection), where=there)
    mean: NDArray[np.float64] = 100 * iou.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)
    return mean


def bootstrap(
    arm_S2NK: NDArray[np.int64], baseline_S2NK: NDArray[np.int64], *, seed: int = 0, draws: int = _DRAWS
) -> tuple[float, float]:
    """95 % interval over images of the mean over seeds of mIoU(arm) - mIoU(baseline).

    Args:
        arm_S2NK, baseline_S2NK: counts on the same images, paired by seed.
        seed: of the images drawn.
        draws: how many sets of N images are drawn, with repetition.
    """
    assert arm_S2NK.shape == baseline_S2NK.shape
    images = arm_S2NK.shape[2]
    random = np.random.default_rng(seed)
    even = np.full(images, 1 / images)
    found: list[NDArray[np.float64]] = []
    for start in range(0, draws, _BLOCK):
        times_BN = random.multinomial(images, even, size=min(_BLOCK, draws - start)).astype(np.float64)
        pairs = [
            _mean_iou(times_BN @ arm_2NK.astype(np.float64)) - _mean_iou(times_BN @ baseline_2NK.astype(np.float64))
            for arm_2NK, baseline_2NK in zip(arm_S2NK, baseline_S2NK, strict=True)
        ]
        found.append(np.mean(pairs, axis=0))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)
