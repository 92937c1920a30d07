"""The indicator against gradient descent that is really run, and its verdicts on branches whose scale is injected."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import equalize
from equalize.moments.covariance import InputStatistics
from equalize.moments.measure import measure_branches
from equalize.moments.measured import with_moments
from equalize.plan import indicator
from equalize.plan.indicator import expected_of_all, gained, with_expectation
from tests.moments.test_covariance import Labeled


class Readable(nn.Module):
    """Two branches that tell one half of the label each; one is multiplied by `scale`."""

    def __init__(self, scale: float, groups: int = 1) -> None:
        super().__init__()
        self.scale = scale
        self.low = nn.Conv2d(1, 4, 3, padding=1, stride=2)
        self.high = nn.Conv2d(2, 4, 1)
        self.fuse = nn.Conv2d(8, 4, 1, groups=groups)

    def forward(self, x):
        low = F.interpolate(self.low(x[:, :1]), size=x.shape[2:], mode="nearest")
        return self.fuse(torch.cat([low * self.scale, self.high(x[:, 1:])], 1))


def scene(number=12):
    """Smooth images, and labels that say in which channels they are bright."""
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.randn(number, 3, 5, 5, generator=generator), (24, 24), mode="bilinear")
    labels = (images[:, 0] > 0).long() + 2 * (images[:, 2] > 0).long()
    return images, labels


def measured(scale, *, labels=True, groups=1, number=12):
    torch.manual_seed(0)
    model = Readable(scale, groups).eval()
    images, classes = scene(number)
    (site,) = equalize.scan(model, images[:2]).sites
    batches = Labeled(images, classes) if labels else images.split(2)
    found = measure_branches(model, [site], batches, statistics=True)
    return with_moments(site, found.moments["fuse"]), found.statistics["fuse"]


def descended(statistics, optimizer, factor_C, steps=100):
    """The share of the labels' variance that gradient descent explains: every step is taken, in standardized units.

    Adam is plain descent with channel j's step divided by the root of Sigma_jj.
    """
    sigma, b = (factor_C[:, None] * statistics.covariance_CC * factor_C), factor_C[:, None] * statistics.cross_CK
    step_C = torch.diagonal(sigma) ** (-0.5 if optimizer == "adamw" else 0)
    largest = torch.linalg.eigvals(step_C[:, None] * sigma).real.max()
    w = torch.zeros_like(b)
    for _ in range(steps):
        gradient = sigma @ w - b
        w = w - step_C[:, None] * gradient / largest
    residual = statistics.label_variance - 2 * (w * b).sum() + (w * (sigma @ w)).sum()
    return 1 - float(residual) / statistics.label_variance


@pytest.mark.parametrize("most_decomposed", [1024, 0])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("scale", [1.0, 0.05, 30.0])
def test_the_formula_is_what_gradient_descent_reaches(optimizer, scale, most_decomposed, monkeypatch):
    monkeypatch.setattr(indicator, "_MOST_DECOMPOSED", most_decomposed)
    site, statistics = measured(scale)
    equalizers = torch.tensor([1 / branch.std for branch in site.branches]).double().repeat_interleave(4)
    before = descended(statistics.whole, optimizer, torch.ones(8).double())
    after = descended(statistics.whole, optimizer, equalizers)
    assert gained(site, statistics.whole, optimizer) == pytest.approx(after - before, abs=1e-6)  # the eigenvalue's


def test_a_group_reads_the_labels_from_its_own_channels():
    site, statistics = measured(0.05, groups=2)
    halves = [slice(0, 4), slice(4, 8)]
    assert gained(site, statistics.whole, "sgd") == pytest.approx(
        _by_groups(statistics.whole, halves, [1 / branch.std for branch in site.branches])
        - _by_groups(statistics.whole, halves, [1.0, 1.0]),
        abs=1e-9,
    )


def _by_groups(statistics, parts, factors):
    """Both groups descend with one step size."""
    sigmas = [f * f * statistics.covariance_CC[part, part] for part, f in zip(parts, factors, strict=True)]
    crosses = [f * statistics.cross_CK[part] for part, f in zip(parts, factors, strict=True)]
    largest = max(float(torch.linalg.eigvalsh(sigma)[-1]) for sigma in sigmas)
    explained = 0.0
    for sigma, b in zip(sigmas, crosses, strict=True):
        w = torch.zeros_like(b)
        for _ in range(100):
            w += (b - sigma @ w) / largest
        explained += float(2 * (w * b).sum() - (w * (sigma @ w)).sum())
    return explained / len(parts) / statistics.label_variance


@pytest.mark.parametrize("labels", [True, False])
def test_equal_scales_promise_nothing_and_far_ones_a_gain(labels):
    deltas = {}
    for scale in (0.001, 1.0):
        site, statistics = measured(scale, labels=labels)
        deltas[scale] = with_expectation(site, statistics)
    near = with_expectation(*measured(deltas[1.0].branches[1].std / deltas[1.0].branches[0].std, labels=labels))
    assert (near.expect, near.delta) == ("nothing", pytest.approx(0, abs=0.005))
    assert deltas[0.001].expect == "gain"
    assert deltas[0.001].delta > 0.1


def test_without_labels_it_is_the_mean_over_random_targets_of_each_branch(monkeypatch):
    site, statistics = measured(0.05, labels=False)
    exact = gained(site, statistics.whole)
    monkeypatch.setattr(indicator, "_MOST_DECOMPOSED", 0)
    monkeypatch.setattr(indicator, "_PROBES", 4000)
    assert gained(site, statistics.whole) == pytest.approx(exact, abs=0.01)  # 4000 targets a branch
    sigma = statistics.whole.covariance_CC
    standardized = sigma / torch.diagonal(sigma).sqrt()
    shares = []
    for part in (slice(0, 4), slice(4, 8)):  # every channel of a branch as the target, one after the other
        for target in range(*part.indices(8)):
            statistic = InputStatistics(
                positions=1, mean_C=torch.zeros(8), covariance_CC=sigma,
                cross_CK=standardized[:, [target]], label_variance=1.0,
            )  # fmt: skip
            shares.append(gained(site, statistic))
    assert exact == pytest.approx(sum(shares) / len(shares), abs=1e-9)


def test_it_cannot_tell_where_the_halves_disagree_or_nothing_was_sampled():
    site, far = measured(0.001)
    silent = replace(far.halves[1], cross_CK=torch.zeros_like(far.halves[1].cross_CK))
    assert with_expectation(site, far).expect == "gain"
    assert with_expectation(site, replace(far, halves=(far.halves[0], silent))).expect == "unclear"
    assert (with_expectation(site, None).expect, with_expectation(site, None).delta) == ("unclear", None)
    _, single = measured(0.001, number=1)
    assert single.halves[1].positions == 0
    found = with_expectation(site, single)
    assert found.expect == "unclear"
    assert found.delta is not None


def test_the_network_gains_where_one_layer_does():
    site, statistics = measured(0.001)
    gain = with_expectation(site, statistics)
    near = measured(1.0)[0]
    nothing = with_expectation(*measured(near.branches[1].std / near.branches[0].std))
    assert expected_of_all([nothing, gain, site]) == ("gain", gain.delta)
    assert expected_of_all([nothing, site]) == ("unclear", nothing.delta)
    assert expected_of_all([nothing, nothing]) == ("nothing", nothing.delta)
    assert expected_of_all([]) == ("nothing", None)


def test_step_shares_are_energies():
    site, _ = measured(0.05)
    energies = [4 * branch.std**2 for branch in site.branches]
    assert [branch.step_share for branch in site.branches] == pytest.approx(
        [each / math.fsum(energies) for each in energies]
    )
