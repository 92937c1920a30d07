"""Histograms of a branch as curves to draw: rebinned, scaled and shifted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from equalize.moments.histograms import BINS, bin_edges

_Floats = NDArray[np.float64]

_BEYOND = 0.0025  # of the values may lie beyond each end of the axis
_ZEROS = 0.02  # from this share on they are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How the values of a branch are distributed, but for those that are exactly zero.

    Attributes:
        zeros: their share.
        ends: of the bins, ascending (K + 1,). below: the share of the other values below each of them (K + 1,).
        zero: where zeros lie.
    """

    zeros: float
    ends: _Floats
    below: _Floats
    zero: float = 0.0

    @classmethod
    def of(cls, counts_K: Tensor) -> Self:
        """That of counts (BINS,), which are not all zero."""
        counts = counts_K.numpy().astype(np.float64)
        total, middle = counts.sum(), slice(BINS // 2 - 1, BINS // 2 + 1)
        zeros = float(counts[middle].sum() / total)
        counts[middle] = 0
        below = np.concatenate([[0.0], counts.cumsum()])
        return cls(zeros=zeros, ends=bin_edges().numpy(), below=below / max(below[-1], 1.0))

    def scaled(self, factor: float, mean: float = 0.0) -> "Distribution":
        """The same of (value - mean) * factor."""
        zero = (self.zero - mean) * factor
        return Distribution(zeros=self.zeros, ends=(self.ends - mean) * factor, below=self.below, zero=zero)

    def range(self) -> tuple[float, float]:
        """Between which nearly all values lie."""
        if not self.below[-1]:
            return self.zero, self.zero
        # of equal shares, the last end before the values and the first one behind them
        first = self.ends[np.searchsorted(self.below, _BEYOND, side="right") - 1]
        last = self.ends[np.searchsorted(self.below, 1 - _BEYOND, side="left")]
        ends = [float(first), float(last), *([self.zero] if self.zeros > _ZEROS else [])]
        return min(ends), max(ends)

    def heights(self, edges: _Floats) -> _Floats:
        """The share of the values other than zero in each bin between edges (D + 1,): (D,)."""
        shares: _Floats = np.diff(np.interp(edges, self.ends, self.below))
        return shares


def common_range(distributions: Sequence[Distribution]) -> tuple[float, float]:
    """Where nearly all values of all of them lie."""
    ranges = [each.range() for each in distributions]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def draw_rows(axes: Any, distributions: Sequence[Distribution], colors: Sequence[str]) -> None:
    """A curve a row, the first on top, each to its own height; a line and its share where many values are zero."""
    low, high = common_range(distributions)
    edges = np.linspace(low, high, 161)
    for row, (each, color) in enumerate(zip(distributions, colors, strict=True)):
        heights = np.sqrt(each.heights(edges))  # of the density: tails are seen beside a peak
        heights *= 0.82 / max(heights.max(), 1e-12)
        base = row + 0.42
        axes.fill_between(edges[:-1], base - heights, base, step="post", color=color, alpha=0.45, linewidth=0)
        axes.step(edges[:-1], base - heights, where="post", color=color, linewidth=0.9)
        if each.zeros > _ZEROS:
            axes.plot([each.zero] * 2, [base - 0.82, base], color=color, linewidth=2)
    axes.set_xlim(low, high)
