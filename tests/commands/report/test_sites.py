"""Curves of histograms against the values themselves, and names that must stay apart in a figure."""

import numpy as np
import pytest
import torch

from equalize.commands.report.distributions import Distribution, common_range
from equalize.commands.report.sites import short_names
from equalize.moments.histograms import count_values
from equalize.moments.sampling import Samples
from tests.cli.reports.test_plan import MEASURED


def counted(values):
    """The histogram of values, as of both branches."""
    samples = [Samples(values_NPC=values.view(1, -1, 1).expand(-1, -1, 12).contiguous(), grid=(1, len(values)))]
    return count_values({MEASURED.layer: samples}, [MEASURED], 1)[MEASURED.layer][0]


def test_a_curve_shows_the_shares_of_the_values_scaled_and_centered():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).mul_(0.3).add_(0.1).clamp_min_(0)
    found = Distribution.of(counted(values))
    zeros = float((values == 0).double().mean())
    assert found.zeros == pytest.approx(zeros)
    assert zeros > 0.3
    centered = found.scaled(2.5, mean=0.2)
    edges = np.linspace(-0.6, 2.5, 30)
    expected, _ = np.histogram((values[values > 0].numpy() - 0.2) * 2.5, edges)
    # bins are up to 1/16 of a value wide, and interpolated
    assert centered.heights(edges) == pytest.approx(expected / (values > 0).sum().item(), abs=0.012)
    assert centered.zero == pytest.approx(-0.5)
    low, high = centered.range()
    assert low == pytest.approx(-0.5)
    assert high == pytest.approx(float((values.quantile(0.998) - 0.2) * 2.5), rel=0.1)


def test_constant_values_have_a_range_too():
    low, high = common_range([Distribution.of(counted(torch.zeros(8)))])
    assert low < 0 < high


def test_names_are_short_and_stay_apart():
    aspp = [f"decode_head.aspp_modules.{index}.depthwise_separable.pointwise_conv.activate" for index in range(12)]
    for most in (31, 38):
        names = [*aspp, "", "skip"]
        short = short_names(names, most)
        assert len(set(short)) == len(names)
        assert max(map(len, short)) <= most
        assert short[-2:] == ["input", "skip"]
    assert short_names(["backbone.encoder.stages.3.layers.0"], 31) == ["…encoder.stages.3.layers.0"]
    same = short_names([aspp[0], aspp[0]], 31)
    assert same[0] == same[1]  # one module may feed two branches
