"""Moments arithmetic against exact rational arithmetic and repeated sampling."""

import math
from fractions import Fraction

import pytest
import torch

from equalize.moments.moments import Moments, merge, per_image, pool


def exact(x: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation in rational arithmetic."""
    values = [Fraction(value) for value in x.double().flatten().tolist()]
    mean = sum(values) / len(values)
    return float(mean), math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


@pytest.mark.parametrize("ratio", [0, 1, 100, 1e4])
def test_each_image_exactly(ratio):
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 3 * ratio
    rows = per_image(x)
    assert rows.count == 128
    for image, mean, m2 in zip(x, rows.mean_N.tolist(), rows.m2_N.tolist(), strict=True):
        expected_mean, expected_std = exact(image)
        assert mean == pytest.approx(expected_mean, rel=1e-6, abs=1e-7)
        assert math.sqrt(m2 / 128) == pytest.approx(expected_std, rel=1e-6)


@pytest.mark.parametrize("ratio", [0, 1e4, -1e4])
def test_pooling_far_apart_images(ratio):
    """Images whose own means differ: the variance between them counts."""
    torch.manual_seed(1)
    x = torch.randn(6, 4, 5, 5) + 2 * torch.randn(6, 1, 1, 1) + ratio
    mean, std = exact(x)
    for split in ([6], [1] * 6, [2, 3, 1]):
        pooled = pool([per_image(block) for block in x.split(split)])
        assert (pooled.count, pooled.images) == (600, 6)
        assert pooled.mean == pytest.approx(mean, rel=1e-6, abs=1e-7)
        assert pooled.std == pytest.approx(std, rel=1e-6)
        assert pooled.var == pytest.approx(std**2, rel=2e-6)


@pytest.mark.parametrize("ratio", [0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_images_of_any_strides(ratio, dtype):
    """More numbers than are passed over at a time: channels first and last, a slice of channels, a stretched pixel."""
    x = (torch.randn(2, 12, 96, 130, generator=torch.Generator().manual_seed(3)) + ratio).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    for u in (x, last, x[:, 1:], last[:, 1:], last[:, :, ::2, 1:], x.transpose(0, 3), x[:, :, :1, :1].expand_as(x)):
        rows, found = u.double().flatten(1), per_image(u)
        std = rows.std(1, correction=0)
        assert found.count == rows.shape[1]
        assert torch.allclose(found.mean_N, rows.mean(1), rtol=0, atol=1e-6 * float(std.mean() + ratio))
        assert torch.allclose((found.m2_N / found.count).sqrt(), std, rtol=1e-6)


@pytest.mark.parametrize("ratio", [0, 1e4])
def test_parts_of_any_size_merge_to_the_moments_of_the_whole(ratio):
    x = (torch.randn(2, 30, generator=torch.Generator().manual_seed(4)) * 3 + 3 * ratio).double()
    parts = x.split([1, 12, 17], dim=1)
    mean_NP = torch.stack([part.mean(1) for part in parts], -1)
    m2_NP = torch.stack([part.var(1, correction=0) * part.shape[1] for part in parts], -1)
    mean_N, q_NP = merge(torch.tensor([1.0, 12.0, 17.0]).double(), mean_NP, m2_NP)
    for row, mean, m2 in zip(x, mean_N, q_NP.sum(1), strict=True):
        expected_mean, expected_std = exact(row)
        assert float(mean) == pytest.approx(expected_mean, rel=1e-12)  # float64, sums of thirty
        assert math.sqrt(float(m2) / 30) == pytest.approx(expected_std, rel=1e-9)


def test_images_count_by_their_size():
    torch.manual_seed(2)
    parts = [torch.randn(1, 1, 4, 4), 10 + torch.randn(2, 1, 2, 3), torch.randn(1, 1, 1, 1)]
    mean, std = exact(torch.cat([part.flatten() for part in parts]))
    pooled = pool([per_image(part) for part in parts])
    assert pooled.count == 16 + 12 + 1
    assert pooled.mean == pytest.approx(mean, rel=1e-6)
    assert pooled.std == pytest.approx(std, rel=1e-6)


def test_a_constant_has_no_spread():
    pooled = pool([per_image(torch.full((3, 2, 4, 4), 0.1))])
    assert pooled.std < 1e-7
    assert pooled.mean == pytest.approx(0.1, rel=1e-6)


def test_the_input_is_not_written_to():
    x = torch.randn(2, 3, 4)
    before = x.clone()
    per_image(x)
    per_image(x.double())
    assert torch.equal(x, before)


@pytest.mark.parametrize(("images", "quantile"), [(2, 12.7062), (3, 4.3027), (6, 2.5706), (31, 2.0423)])
def test_the_interval_has_students_quantile(images, quantile):
    """Images of one number of deviations each: the ratio estimator is then a plain mean of squares."""
    x = torch.stack([torch.tensor([-1.0, 1.0]) * (1 + 0.1 * i) for i in range(images)])
    q = x.double().square().sum(1)
    error = quantile * float(q.std() / math.sqrt(images) / q.mean()) / 2
    assert pool([per_image(x)]).ci95 == pytest.approx(error, rel=2e-5)  # five digits of the table


def test_one_image_has_no_interval():
    assert pool([per_image(torch.randn(1, 3, 4, 4))]).ci95 is None


def test_moments_of_population_not_of_sample():
    assert Moments(count=4, mean=0.0, m2=16.0).std == 2.0


@pytest.mark.parametrize("images", [2, 3, 5, 12, 40])
def test_intervals_cover_the_truth(images):
    """Images of random contrast: 95 % of the intervals should hold the true sigma."""
    generator = torch.Generator().manual_seed(images)
    truth = math.sqrt(1 + 0.3**2)  # of contrast * noise, contrast ~ N(1, 0.3)
    held = 0
    trials = 400
    for _ in range(trials):
        contrast = 1 + 0.3 * torch.randn(images, 1, generator=generator)
        pooled = pool([per_image(contrast * torch.randn(images, 200, generator=generator))])
        assert pooled.ci95 is not None
        held += abs(pooled.std - truth) <= pooled.ci95 * pooled.std
    assert held / trials > 0.86  # few images: the ratio's skew costs some coverage
    if images >= 12:
        assert held / trials < 0.99
