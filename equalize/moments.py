"""Mean and variance of tensors, exactly and in one pass.

Per image: promote to at least float32, m = sum(x)/n, d = x - m, r = sum(d), q = sum(d*d); then in float64
mean = m + r/n and M2 = q - r*r/n, which removes the rounding of m (the corrected two-pass algorithm). Images are
merged in float64 with the update of Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances" (1979). E[x^2] - E[x]^2 is never formed: it loses everything at mean/std 1e4, even in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["ImageMoments", "Moments", "corrected", "per_image", "pool", "promote"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Population moments of a set of numbers.

    Attributes:
        count: how many numbers.
        mean: their mean.
        m2: the sum of their squared deviations from it.
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
    """One row an image: `count` numbers each, (N,) means and (N,) sums of squared deviations, float64."""

    count: int
    mean_N: Tensor
    m2_N: Tensor


def per_image(x: Tensor) -> ImageMoments:
    """Moments of each row of x (N, *), of any floating dtype; the results are on the CPU."""
    x_NL = promote(x).flatten(1)
    count = x_NL.shape[1]
    m_N1 = x_NL.sum(dim=1, keepdim=True) / count
    d_NL = x_NL - m_N1
    r_N = d_NL.sum(dim=1)
    q_N = d_NL.square_().sum(dim=1)
    return corrected(count, m_N1.squeeze(1), r_N, q_N)


def promote(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def corrected(count: int, m_N: Tensor, r_N: Tensor, q_N: Tensor) -> ImageMoments:
    """Moments from sums over each row about an approximate mean m: r = sum(x - m), q = sum((x - m)^2)."""
    m_N, r_N, q_N = torch.stack([m_N, r_N, q_N]).cpu().double()
    return ImageMoments(count=count, mean_N=m_N + r_N / count, m2_N=(q_N - r_N.square() / count).clamp_min_(0))


def pool(images: Sequence[ImageMoments]) -> Moments:
    """The moments of all images together, with the interval that the differences between them imply.

    The variance is the ratio of two sums over images, q_i = M2_i + n_i (mean_i - mean)^2 and n_i; its standard error
    is that of a ratio estimator (Cochran, "Sampling Techniques", 3rd ed., 1977, eq. 2.46 and 6.13), and half of its
    relative size is that of the standard deviation.
    """
    n_I = torch.cat([torch.full_like(block.mean_N, block.count) for block in images])
    mean_I = torch.cat([block.mean_N for block in images])
    m2_I = torch.cat([block.m2_N for block in images])
    count = n_I.sum()
    origin = mean_I[0]
    mean = origin + (n_I * (mean_I - origin)).sum() / count
    q_I = m2_I + n_I * (mean_I - mean).square()
    m2 = q_I.sum()
    ci95 = None
    number = len(n_I)
    if number > 1 and m2 > 0:
        variance = m2 / count
        residual = (q_I - variance * n_I).square().sum() * number / (number - 1)
        ci95 = float(_student_t975(number - 1) * residual.sqrt() / m2 / 2)
    return Moments(count=int(count), mean=float(mean), m2=float(m2), images=number, ci95=ci95)


def _student_t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by Hill's expansion (CACM algorithm 396); exact for 1 and 2."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return math.sqrt(2 / (0.05 * 1.95) - 2)
    z: float = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
