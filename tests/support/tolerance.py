"""How far two computations of the same numbers may differ. No tests.

Bits are compared where nothing is computed twice (tensors on disk, weights and random states that were left alone,
whole numbers), where arithmetic is exact (powers of two, copies, float64 element by element), and where the same kernel
runs on the same shape at the same alignment: the same command run twice, `preserve`, resuming, a plan replayed, a plan
made by any number of processes. A comment beside the comparison says which.

Everything else is compared here. A sum over another order, batch or shape, and a tensor at another address (libraries
leave weights where they lie in a mapped file, and a matrix product picks its kernel by alignment too) move a float32 by
its rounding, 6e-8, some times over; which way depends on the processor.
"""

from collections.abc import Mapping, Sequence

import pytest
from torch import Tensor

from equalize.moments.moments import Moments

ROUNDING = 1e-5
"""Of the spread of outputs: over a hundred roundings of float32. A weight in the wrong place moves them by far more."""

TIE = 0.1
"""Percentage points of a score: one or two pixels of thousands in each class, where two classes nearly tie."""


def assert_same_outputs(found: Tensor, expected: Tensor) -> None:
    """Outputs (N, C, H, W) of one network that was loaded, built or saved twice."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= ROUNDING * (expected.max() - expected.min())


def assert_same_moments(found: Sequence[Moments], expected: Sequence[Moments]) -> None:
    """Moments of the same images: what depends on the order of sums moves by rounding, the counts do not."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.count, ours.images) == (theirs.count, theirs.images)
        assert ours.mean == pytest.approx(theirs.mean, abs=1e-6 * theirs.std)
        assert ours.std == pytest.approx(theirs.std, rel=1e-6)
        assert ours.ci95 == (theirs.ci95 and pytest.approx(theirs.ci95, rel=1e-4))  # a difference of near numbers


def assert_same_score(found: Mapping, expected: Mapping) -> None:
    """Scores as JSON, of the same predictions but for near ties."""
    assert found.keys() == expected.keys()
    for ours, theirs in [(found, expected), *zip(found["classes"], expected["classes"], strict=True)]:
        for key, value in theirs.items():
            if isinstance(value, float):
                assert ours[key] == pytest.approx(value, abs=TIE), key
            elif key != "classes":
                assert ours[key] == value, key
