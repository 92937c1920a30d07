"""Histograms of sampled values against counting them one by one, and beside what they must leave as it was."""

import math
import struct

import pytest
import torch

import equalize
from equalize.moments import measure as measurement
from equalize.moments.histograms import BINS, bin_edges, count_values
from equalize.moments.measure import measure_branches
from equalize.moments.sampling import Samples
from tests.moments.test_covariance import Pyramid, entering, rows_at_positions

EXTREME = [0.0, -0.0, 1.0, -1.0, 1.0624999, 1.0625, 3e38, -3e38, 1e-40, -1e-40, 5.5, 5.5, -7.25]


def bin_of(value):
    """By the bytes of the number: sign, exponent and the first four bits of the fraction."""
    (bits,) = struct.unpack(">I", struct.pack(">f", value))
    magnitude = (bits & 0x7FFFFFFF) >> 19
    return BINS // 2 - 1 - magnitude if bits >> 31 else BINS // 2 + magnitude


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_value_falls_into_the_bin_of_its_first_bits(dtype):
    model = Pyramid()
    (site,) = equalize.scan(model, torch.zeros(2, 3, 20, 26)).sites
    values = torch.zeros(1, len(EXTREME), 12, dtype=dtype)
    values[0, :, 7] = torch.tensor(EXTREME, dtype=dtype)  # within the second branch
    samples = [Samples(values_NPC=part, grid=(1, len(EXTREME))) for part in values.split([5, 7], dim=2)]
    counts = count_values({"fuse": samples}, [site], 1)["fuse"]
    assert counts.sum(1).tolist() == [(branch.stop - branch.start) * len(EXTREME) for branch in site.branches]
    expected = torch.zeros(BINS, dtype=torch.int64)
    for value in EXTREME + [0.0] * (3 * len(EXTREME)):
        expected[bin_of(value)] += 1
    assert torch.equal(counts[1], expected)
    edges = bin_edges().tolist()
    assert len(edges) == BINS + 1
    assert edges == sorted(edges)
    for value in torch.tensor(EXTREME).tolist():
        low, high = edges[bin_of(value)], edges[bin_of(value) + 1]
        assert low <= value <= high
        assert abs(value) < 1e-37 or math.isclose(low, high, rel_tol=1 / 16)


@pytest.mark.parametrize("by", ["graph", "hooks"])
def test_counts_are_those_of_the_concat_and_moments_keep_their_bits(by, monkeypatch):
    monkeypatch.setattr(measurement, "_PAYS", 0 if by == "graph" else 1 << 62)
    torch.manual_seed(0)
    model = Pyramid().eval()
    images = torch.randn(5, 3, 20, 26)
    (site,) = equalize.scan(model, images[:2]).sites
    found = measure_branches(model, [site], images.split([3, 2]), histograms=True)
    assert found.method.startswith("cut graph" if by == "graph" else "hooks")
    rows, _ = rows_at_positions(entering(model, images))
    for branch, counts in zip(site.branches, found.histograms["fuse"], strict=True):
        values = rows[:, branch.start : branch.stop].flatten()
        at = torch.tensor([-1.0, -0.25, 0.0, 0.125, 0.5], dtype=torch.float64)  # edges of bins
        below = counts.cumsum(0)[torch.searchsorted(bin_edges(), at, right=True) - 2]
        direct = (values[:, None] < at).sum(0)
        assert counts.sum() == len(values)
        assert ((below - direct).abs() <= 0.001 * len(values)).all()  # the cut graph's kernels round otherwise
    plain = measure_branches(model, [site], images.split([3, 2]))
    assert not plain.histograms
    assert plain.moments == found.moments  # sampling runs beside the same kernels on the same shapes
