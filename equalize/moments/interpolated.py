"""The moments of an interpolated tensor, from the tensor that was interpolated.

With U = U_h (x) U_w the interpolation matrix, whose rows sum to one, and d = x - m the centered source:
sum(U x - m) = 1'U d and sum((U x - m)^2) = d' (U'U) d. Nearest and bilinear interpolation read one or two neighbors an
axis, so U'U is diagonal or tridiagonal along each, and the moments cost as much as a few additions of the source.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from equalize.moments.moments import ImageMoments, corrected, per_image, promote


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolation:
    """A separable interpolation of the last two axes.

    Attributes:
        operator: its name along one axis: upsample_linear1d, upsample_nearest1d, _upsample_nearest_exact1d.
        size: (H, W) that it makes.
        align_corners: None where the operator has no such argument.
        scales: the factors it was called with, which count for more than the sizes; None if by size.
    """

    operator: str
    size: tuple[int, int]
    align_corners: bool | None = None
    scales: tuple[float, float] | None = None

    def matrix(self, axis: int, length: int) -> Tensor:
        """U (size[axis], length), float64: what one axis of `length` entries is multiplied by."""
        scale = None if self.scales is None else [self.scales[axis]]
        extra = () if self.align_corners is None else (self.align_corners,)
        identity = torch.eye(length, dtype=torch.float64).unsqueeze(0)
        operator = getattr(torch.ops.aten, self.operator).vec
        matrix: Tensor = operator(identity, None if scale else [self.size[axis]], *extra, scale)[0].T
        return matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gram:
    """What the moments need of U along one axis of n entries.

    Attributes:
        rows: 1'U (n,).
        diagonal: of U'U (n,).
        beside: the entries next to the diagonal (n - 1,), None if all are zero.
        repeats: how often each entry is copied, if that is all that U does.
    """

    rows: Tensor
    diagonal: Tensor
    beside: Tensor | None
    repeats: int | None

    def times(self, d: Tensor, axis: int) -> Tensor:
        """U'U d, along the axis -2 or -1 of d."""
        shape = (-1, 1) if axis == -2 else (-1,)
        product = d * self.diagonal.view(shape)
        if self.beside is not None:
            beside, fewer = self.beside.view(shape), d.shape[axis] - 1
            product.narrow(axis, 0, fewer).addcmul_(d.narrow(axis, 1, fewer), beside)
            product.narrow(axis, 1, fewer).addcmul_(d.narrow(axis, 0, fewer), beside)
        return product


def interpolated_moments(x: Tensor, interpolation: Interpolation) -> ImageMoments:
    """The moments of each image of x (N, C, h, w) after an interpolation, from x alone; on x's device."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    along_h = _gram(interpolation, 0, x.shape[2], dtype, x.device)
    along_w = _gram(interpolation, 1, x.shape[3], dtype, x.device)
    if along_h.repeats is not None and along_w.repeats is not None:
        once, times = per_image(x), along_h.repeats * along_w.repeats
        return ImageMoments(count=once.count * times, mean_N=once.mean_N, m2_N=once.m2_N * times)
    x = promote(x)
    m_N = x.mean((1, 2, 3))
    d_NChw = x - m_N.view(-1, 1, 1, 1)
    r_N = (d_NChw.sum(1) * along_w.rows).sum(2).mul_(along_h.rows).sum(1)
    q_N = along_w.times(along_h.times(d_NChw, -2), -1).mul_(d_NChw).sum((1, 2, 3))
    return corrected(x.shape[1] * interpolation.size[0] * interpolation.size[1], m_N, r_N, q_N)


@cache
def _gram(interpolation: Interpolation, axis: int, length: int, dtype: torch.dtype, device: torch.device) -> _Gram:
    u = interpolation.matrix(axis, length)
    diagonal, beside = u.square().sum(0), (u[:, 1:] * u[:, :-1]).sum(0)
    assert torch.allclose(u.T @ u, diagonal.diag() + beside.diag(1) + beside.diag(-1)), interpolation
    first = float(diagonal[0])
    copies = not beside.any() and bool((diagonal == first).all()) and bool(((u == 0) | (u == 1)).all())
    return _Gram(
        rows=u.sum(0).to(device, dtype),
        diagonal=diagonal.to(device, dtype),
        beside=beside.to(device, dtype) if beside.any() else None,
        repeats=int(first) if copies else None,
    )
