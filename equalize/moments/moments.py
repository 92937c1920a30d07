"""Mean and variance of tensors, exactly and in one pass.

Per image: promote to at least float32, m = sum(x)/n, d = x - m, r = sum(d), q = sum(d*d); then in float64
mean = m + r/n and M2 = q - r*r/n, which removes the rounding of m (the corrected two-pass algorithm). Images are
merged in float64 with the formula of Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances" (1979). E[x^2] - E[x]^2 is never formed: it loses everything at mean/std 1e4, even in float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers (float32: 512 KiB) that are read from memory once and passed over several times in the processor's cache.
_PART = 2**17


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Population moments of a set of numbers.

    Attributes:
        count, mean: how many numbers, and their mean. m2: the sum of their squared deviations from it.
        images: of how many images they come, if that is known.
        ci95: half width of the 95 % interval of `std` over images, relative to it; None if unknown.
    """

    count: int
    mean: float
    m2: float
    images: int | None = None
    ci95: float | None = None

    @property
    def var(self) -> float:
        """Population variance, M2 / count."""
        return self.m2 / self.count

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return math.sqrt(self.var)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMoments:
    """One row an image: `count` numbers each, (N,) means and sums of squared deviations, float64, on any device."""

    count: int
    mean_N: Tensor
    m2_N: Tensor


def per_image(x: Tensor) -> ImageMoments:
    """Moments (N,) of each row of x (N, *), of any floating dtype and any strides; on x's device."""
    if x.device.type != "cpu" or x.numel() <= _PART or x.ndim == 1:
        return _at_once(x if x.ndim > 1 else x.unsqueeze(1))
    return by_image([_at_once(part) for row in x for part in _in_memory_order(row)], len(x))


def _at_once(x: Tensor) -> ImageMoments:
    x = promote(x)
    count, axes = x[0].numel() if len(x) else 0, tuple(range(1, x.ndim))
    m_N = x.sum(axes) / count
    d = x - m_N.view(-1, *[1] * len(axes))
    r_N = d.sum(axes)
    return corrected(count, m_N, r_N, d.square_().sum(axes))


def _in_memory_order(row: Tensor) -> Iterator[Tensor]:
    """The numbers of one image, (1, *) at a time, so many that they stay in the processor's cache."""
    row = row.permute(sorted(range(row.ndim), key=row.stride, reverse=True))
    if row.is_contiguous():
        row = row.view(-1)
    for part in torch.split(row, max(1, _PART * len(row) // row.numel())):
        yield part.unsqueeze(0)


def merge(counts_P: Tensor, mean_P: Tensor, m2_P: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (*) of numbers that come in P parts, and what each adds to the sum of squared deviations from it (*, P).

    q_p = M2_p + n_p (mean_p - mean)^2, which sum to M2 (Chan, Golub & LeVeque 1979); counts_P (P,) are not all zero,
    means and M2 of the parts are (*, P), all of them float64.
    """
    origin_1 = mean_P[..., :1]  # sums of differences lose less than sums of large means
    mean_1 = origin_1 + (counts_P * (mean_P - origin_1)).sum(-1, keepdim=True) / counts_P.sum()
    return mean_1.squeeze(-1), m2_P + counts_P * (mean_P - mean_1).square()


def by_image(parts: Sequence[ImageMoments], images: int) -> ImageMoments:
    """The moments of images that come in as many rows each, one after the other: frames, windows, tokens."""
    counts_NP, mean_NP, m2_NP = (each.view(images, -1) for each in _rows(parts))
    mean_N, q_NP = merge(counts_NP[0], mean_NP, m2_NP)
    count = sum(part.count * len(part.mean_N) for part in parts) // images
    return ImageMoments(count=count, mean_N=mean_N, m2_N=q_NP.sum(1))


def by_call(calls: Sequence[ImageMoments], images: int) -> ImageMoments:
    """Of all calls of a layer: by image, where each call got all images or each one of them; else as one row."""
    if any(len(call.mean_N) != images for call in calls):
        return by_image(calls, images if [len(call.mean_N) for call in calls] == [1] * images else 1)
    mean_NP, m2_NP = (torch.stack(rows, 1) for rows in zip(*((call.mean_N, call.m2_N) for call in calls), strict=True))
    mean_N, q_NP = merge(mean_NP.new_tensor([call.count for call in calls]), mean_NP, m2_NP)
    return ImageMoments(count=sum(call.count for call in calls), mean_N=mean_N, m2_N=q_NP.sum(1))


def _rows(parts: Sequence[ImageMoments]) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, means and M2 of all rows (R,), float64."""
    return (
        torch.cat([torch.full_like(part.mean_N, part.count) for part in parts]),
        torch.cat([part.mean_N for part in parts]),
        torch.cat([part.m2_N for part in parts]),
    )


def promote(x: Tensor) -> Tensor:
    """x (*) in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def corrected(count: int, m_N: Tensor, r_N: Tensor, q_N: Tensor) -> ImageMoments:
    """Moments (N,) from sums over each row about an approximate mean m: r = sum(x - m), q = sum((x - m)^2), (N,)."""
    sums_3N = torch.stack([m_N, r_N, q_N])
    m_N, r_N, q_N = (sums_3N if sums_3N.is_cuda else sums_3N.cpu()).double()  # Metal has no float64
    return ImageMoments(count=count, mean_N=m_N + r_N / count, m2_N=(q_N - r_N.square() / count).clamp_min_(0))


def pool(images: Sequence[ImageMoments]) -> Moments:
    """The moments of all images together, with the interval that the differences between them imply.

    The variance is the ratio of two sums over images, q_i = M2_i + n_i (mean_i - mean)^2 and n_i; its standard error
    is that of a ratio estimator (Cochran, "Sampling Techniques", 3rd ed., 1977, eq. 2.46 and 6.13), and half of its
    relative size is that of the standard deviation.
    """
    n_I, mean_I, m2_I = (each.cpu() for each in _rows(images))
    mean, q_I = merge(n_I, mean_I, m2_I)
    count, m2 = n_I.sum(), q_I.sum()
    ci95 = None
    number = len(n_I)
    if number > 1 and m2 > 0:
        variance = m2 / count
        from scipy.special import stdtrit  # not for every command: importing it takes long

        residual = (q_I - variance * n_I).square().sum() * number / (number - 1)
        ci95 = float(stdtrit(number - 1, 0.975) * residual.sqrt() / m2 / 2)  # the quantile of Student's t
    return Moments(count=int(count), mean=float(mean), m2=float(m2), images=number, ci95=ci95)
