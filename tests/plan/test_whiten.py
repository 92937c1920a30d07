"""The whitening map against its formula by other routes, and its folding against layers fed with mapped inputs."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

from equalize.errors import NumericsError
from equalize.plan.whiten import fold_map, oas, refuse_whitening, unfold_map, whitening
from equalize.sites.scan import scan
from tests.support.networks import Fusion


def drawn(channels, samples, seed=0, scales=None):
    """A sample covariance of correlated channels, (C, C)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels**0.5
    x = torch.randn(samples, channels, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(channels))
    return torch.cov(x.mul(1.0 if scales is None else scales).T, correction=0)


def sigmas(covariance, *widths):
    """What the branches' standard deviations would be if their channels had one mean, for each channel."""
    parts = covariance.diagonal().split(widths)
    return torch.cat([part.mean().sqrt().expand(len(part)) for part in parts])


def iterated_oas(s, n, rounds=2000):
    """The fixed point of Chen et al.'s equations 21 and 22, which their equation 23 gives in closed form."""
    s = s.numpy()
    p = len(s)
    target = np.trace(s) / p * np.eye(p)
    estimate = s
    for _ in range(rounds):
        along, square = np.trace(estimate @ s), np.trace(estimate) ** 2
        share = ((1 - 2 / p) * along + square) / ((n + 1 - 2 / p) * along + (1 - n / p) * square)
        estimate = (1 - share) * s + share * target
    return estimate


@pytest.mark.parametrize(("channels", "samples"), [(2, 5), (8, 20), (30, 12), (40, 400)])
def test_shrinkage_is_the_fixed_point_of_the_oracle_iteration(channels, samples):
    s = drawn(channels, samples)
    shrunk = oas(s, samples)
    np.testing.assert_allclose(shrunk.numpy(), iterated_oas(s, samples), rtol=1e-6, atol=1e-8)
    assert torch.linalg.eigvalsh(shrunk).min() > 0  # also where there are fewer samples than channels


def test_shrinkage_at_its_ends():
    assert torch.equal(oas(torch.eye(3) * 4, 10), torch.eye(3) * 4)  # powers of two
    assert torch.equal(oas(torch.tensor([[4.0]]), 10), torch.tensor([[4.0]]))
    one = torch.ones(6, 6, dtype=torch.float64)
    torch.testing.assert_close(oas(one, 10**9), one, rtol=1e-6, atol=1e-6)  # many samples are believed


@pytest.mark.parametrize("groups", [1, 2])
def test_map_by_the_formula(groups):
    covariance = drawn(12, 50, scales=torch.tensor([20.0] * 3 + [1.0] * 6 + [5.0] * 3))
    std = sigmas(covariance, 3, 6, 3)  # two branches in each group
    a = whitening(covariance, std, 50, groups)
    assert a.shape == (12, 12 // groups)
    for group in torch.arange(12).chunk(groups):
        sigma, scale = covariance[group][:, group].numpy(), np.diag(1 / std[group].numpy())
        root = np.linalg.inv(scipy.linalg.sqrtm(iterated_oas(torch.from_numpy(scale @ sigma @ scale), 50)))
        expected = root @ scale
        expected *= np.sqrt(np.trace(sigma) / np.trace(expected @ sigma @ expected.T))
        np.testing.assert_allclose(a[group].numpy(), expected, rtol=1e-6, atol=1e-8)
        assert not np.allclose(expected, expected.T)  # W = V A, not V A'


def test_weak_branch_is_not_swamped():
    """Shrinking the raw covariance leaves the weak branch weak; equalized first, both come to sigma_rms."""
    widths, scales = (18, 80), torch.tensor([15.0] * 18 + [0.6] * 80)
    covariance = drawn(98, 4000, scales=scales)
    std = sigmas(covariance, *widths)
    rms = float(covariance.diagonal().mean().sqrt())

    def after(a):
        return [float(part.mean().sqrt()) for part in (a @ covariance @ a.T).diagonal().split(widths)]

    strong, weak = after(whitening(covariance, std, 100))
    assert strong == pytest.approx(rms, rel=0.15)
    assert weak == pytest.approx(rms, rel=0.15)
    raw = torch.from_numpy(np.linalg.inv(scipy.linalg.sqrtm(iterated_oas(covariance, 100))))
    strong, weak = after(raw)
    assert strong > 4 * weak


def test_scaling_a_branch_changes_nothing_but_the_overall_size():
    covariance, widths = drawn(10, 30), (4, 6)
    factor = torch.tensor([300.0] * 4 + [0.01] * 6)
    scaled = factor.view(-1, 1) * covariance * factor
    a, b = whitening(covariance, sigmas(covariance, *widths), 30), whitening(scaled, sigmas(scaled, *widths), 30)
    x, y = a, b * factor  # as maps of the channels before scaling
    torch.testing.assert_close(y / y.norm(), x / x.norm(), rtol=1e-9, atol=1e-12)


def test_many_samples_give_white_channels():
    covariance = drawn(6, 10_000)
    a = whitening(covariance, sigmas(covariance, 2, 4), 10**8)
    torch.testing.assert_close(
        a @ covariance @ a.T, torch.eye(6).double() * covariance.trace() / 6, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_covariance_that_is_none(value):
    covariance = torch.eye(4).double()
    covariance[2:, 2:] *= value
    with pytest.raises(NumericsError, match=r"channels 2\.\.4"):
        whitening(covariance, torch.ones(4), 5, groups=2)


LAYERS = {
    "pointwise": (nn.Conv2d(6, 5, 1), F.conv2d),
    "3 x 3, strided": (nn.Conv2d(6, 5, 3, stride=2, padding=1, dilation=2), F.conv2d),
    "grouped": (nn.Conv2d(6, 4, (3, 1), groups=2), F.conv2d),
    "linear": (nn.Linear(6, 5), None),
    "1-d": (nn.Conv1d(6, 5, 3, padding=1), F.conv1d),
    "3-d, grouped": (nn.Conv3d(6, 6, 2, groups=3), F.conv3d),
}


@pytest.mark.parametrize("case", LAYERS)
def test_folding_equals_mapping_the_input(case):
    layer, convolve = LAYERS[case]
    layer = layer.double()
    groups = getattr(layer, "groups", 1)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6 // groups, generator=generator, dtype=torch.float64)
    if convolve is None:
        u = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64)
        mapped = u @ a.T
    else:
        u = torch.randn(2, 6, *[5] * (layer.weight.ndim - 2), generator=generator, dtype=torch.float64)
        mapped = convolve(u, a.view(*a.shape, *[1] * (u.ndim - 2)), groups=groups)
    v = layer.weight.detach().clone()
    expected = layer(mapped)
    with torch.no_grad():
        layer.weight.copy_(fold_map(v, a))
    torch.testing.assert_close(layer(u), expected, rtol=1e-10, atol=1e-10)  # without padding by the mean: 0 maps to 0
    torch.testing.assert_close(unfold_map(layer.weight.detach(), a), v, rtol=1e-10, atol=1e-10)


def test_dtype_and_gradient_stay_with_the_weight():
    v = torch.randn(3, 4, 1, 1, requires_grad=True)
    w = fold_map(v, 0.25 * torch.eye(4, dtype=torch.float64))
    assert w.dtype == torch.float32
    w.sum().backward()
    assert v.grad is not None
    assert torch.equal(v.grad, torch.full_like(v, 0.25))  # powers of two
    assert unfold_map(w.detach(), torch.eye(4)).dtype == torch.float32


@pytest.mark.parametrize(
    ("fuse", "reason"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), "depthwise"),
        (nn.ConvTranspose2d(6, 5, 2), "transposed"),
        (nn.Conv2d(6, 4, 3, groups=2), None),
        (nn.Linear(6, 5), None),
    ],
)
def test_refuses_layers_that_mix_no_channels_on_their_second_axis(fuse, reason):
    (site,) = scan(Fusion(fuse), torch.randn(1, 3, 8, 8), kinds=("resampled", "plain")).sites
    refusal = refuse_whitening(site)
    assert (refusal is None) if reason is None else (refusal is not None and reason in refusal.reason)
