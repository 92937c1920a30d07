"""Scale equalization folded into the weights of a linear layer: the equation, on bare tensors.

With branches u_b, moments mu_b and sigma_b, and a layer's weights V and bias a (Kim & Kim, "Scale Equalization for
Multi-Level Feature Fusion", arXiv 2402.01149):

    y = sum_b V_b * (u_b - mu_b) tau/sigma_b + a        explicit equalizers in front of the layer
      = sum_b W_b * u_b + (a - s)                       folded
    W_b = V_b tau/sigma_b,   s = sum_b mu_b sum_{c,k} W_b[:, c, k]

The paper equalizes to tau = 1; sigma_rms keeps the size of the layer's step, see docs/design.md. `DiagonalMap` goes
from V to W and back, `shift_of` is s.

Shapes: O output and I input channels, G groups, K kernel positions. A weight is (O, I/G, *K), of a transposed
convolution (I, O/G, *K), of a linear layer (O, I).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from equalize.moments.measured import MeasuredSite
from equalize.sites.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where the input channels of a weight are.

    Attributes:
        axis: 1; 0 for depthwise and transposed convolutions.
        groups: of a convolution.
        transposed: whether output channels, too, are on axis 1.
    """

    axis: int
    groups: int
    transposed: bool

    @classmethod
    def of(cls, site: Site) -> Self:
        """The geometry of a site's weight."""
        return cls(axis=site.axis, groups=site.groups, transposed="transpose" in site.op)

    def fits(self, weight: Tensor, inputs: int) -> bool:
        """Whether `weight`, of any of the shapes above, is one of a layer with so many input channels."""
        if self.axis == 0 and not self.transposed:
            return weight.shape[0] % inputs == 0
        return weight.ndim > 1 and weight.shape[self.axis] * (self.groups if self.axis == 1 else 1) == inputs


def branch_vectors(site: MeasuredSite, scales: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every input channel's branch, (I,) each, divided by each branch's scale."""
    scales = scales or (1.0,) * len(site.branches)
    pairs = list(zip(site.branches, scales, strict=True))
    return (
        per_channel([(branch.start, branch.stop, branch.mean / scale) for branch, scale in pairs]),
        per_channel([(branch.start, branch.stop, branch.std / scale) for branch, scale in pairs]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalMap:
    """A of W = V A: the factor of each input channel, tau/sigma of its branch, (I,)."""

    factor_I: Tensor
    geometry: Geometry

    def fold(self, v: Tensor) -> Tensor:
        """W = V tau/sigma, of v's shape and dtype; differentiable in v."""
        return scale_inputs(v, self.factor_I, self.geometry)

    def unfold(self, w: Tensor) -> Tensor:
        """V = W sigma/tau, of w's shape and dtype."""
        return scale_inputs(w, 1 / self.factor_I, self.geometry)


def shift_of(w: Tensor, mean_I: Tensor, geometry: Geometry) -> Tensor:
    """s (O,), the response of w to the means, to be subtracted from the bias; differentiable in w."""
    response = scale_inputs(w, mean_I, geometry)
    if geometry.transposed:
        sum_IO = response.flatten(2).sum(2)
        inputs, outputs = sum_IO.shape
        return sum_IO.view(geometry.groups, inputs // geometry.groups, outputs).sum(1).flatten()
    return response.flatten(1).sum(1)


def scale_inputs(weight: Tensor, factor_I: Tensor, geometry: Geometry) -> Tensor:
    """`weight`, of any of the shapes above, with all entries for input channel i multiplied by factor_I[i], (I,)."""
    factor_I = factor_I.to(weight)
    tail = (1,) * (weight.ndim - 2)
    if geometry.axis == 0:  # depthwise with a channel multiplier: several rows read one channel
        rows = factor_I.repeat_interleave(weight.shape[0] // len(factor_I))
        return weight * rows.view(-1, 1, *tail)
    per_group = factor_I.view(geometry.groups, 1, -1)  # (G, 1, I/G): the rows of one group read the same channels
    rows = per_group.expand(-1, weight.shape[0] // geometry.groups, -1).reshape(weight.shape[0], weight.shape[1])
    return weight * rows.view(*rows.shape, *tail)


def per_channel(ranges: Sequence[tuple[int, int, float]]) -> Tensor:
    """Branch-wise values (start, stop, value), contiguous from 0, as a float64 vector (I,)."""
    return torch.cat([torch.full((stop - start,), value, dtype=torch.float64) for start, stop, value in ranges])
