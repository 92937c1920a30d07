"""Whitening of a fusion layer's input, folded into its weights: the equation, on bare tensors.

With channels u of covariance Sigma (C, C) and sigma_b of their branches, the layer trains on x = A u:

    D = diag(1/sigma_b),   S = D Sigma D,   A = c OAS(S)^(-1/2) D,   c such that tr(A Sigma A') = tr Sigma
    W[o, j, ...] = sum_i V[o, i, ...] A[i, j]

The branches are equalized before they are whitened: shrinking Sigma itself would pull the weak branches towards the
variance of the strong ones, and the map would leave them weak. D undoes any scaling of a branch exactly, so that A u
does not depend on it but for c.

Shapes as in `equation`, C input channels. A grouped layer is G layers side by side: its map is (C, C/G), laid out as
the weight of a grouped 1x1 convolution from u to x; the formula holds for each group by itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from equalize.errors import NumericsError, SiteError
from equalize.moments.covariance import SplitStatistics
from equalize.moments.measured import MeasuredSite
from equalize.plan.equation import branch_vectors
from equalize.sites.refusals import Refusal
from equalize.sites.sites import Site


def refuse_whitening(site: Site) -> Refusal | None:
    """Why the input of a fusion layer cannot be whitened; None where it can."""
    if "transpose" in site.op:
        return Refusal(at=site.layer, reason="cannot be whitened: it is a transposed convolution")
    if site.axis == 0:
        return Refusal(at=site.layer, reason="cannot be whitened: it is depthwise and mixes no channels")
    return None


def whitening_of(site: MeasuredSite, statistics: SplitStatistics | None) -> Tensor | Refusal:
    """The map of a measured site, on the CPU, or why there is none."""
    if (refusal := refuse_whitening(site)) is not None:
        return refusal
    if statistics is None:
        reason = "cannot be whitened: the covariance of its input channels was not measured"
        return Refusal(at=site.layer, reason=f"{reason} (more than 4096, or its rows are no images)")
    _, std_C = branch_vectors(site)
    try:
        return whitening(statistics.whole.covariance_CC.cpu(), std_C, statistics.whole.images, site.groups)
    except NumericsError as error:
        return Refusal(at=site.layer, reason=f"cannot be whitened: {error}")


def demand_map(layer: str, map_CC: Tensor, weight: Tensor) -> None:
    """Refuses a map that is not one of a layer with this weight, by a SiteError."""
    inputs = weight.shape[1]
    fits = map_CC.ndim == 2 and map_CC.shape[1] == inputs and map_CC.shape[0] % inputs == 0
    if not fits or weight.shape[0] % (map_CC.shape[0] // inputs) or not map_CC.isfinite().all():
        what, remedy = "has a matrix in equalize.safetensors that does not fit it", "calibrate the original again"
        raise SiteError(layer, what, got=list(map_CC.shape), remedy=remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhiteningMap:
    """An `equation.InputMap` of a map A."""

    map_CC: Tensor

    def fold(self, v: Tensor) -> Tensor:
        """W = V A; in the map's precision also where layers run in a lower one."""
        with torch.autocast(v.device.type, enabled=False):
            return fold_map(v, self.map_CC)

    def unfold(self, w: Tensor) -> Tensor:
        """V = W A^(-1)."""
        return unfold_map(w, self.map_CC)


def whitening(covariance_CC: Tensor, std_C: Tensor, images: int, groups: int = 1) -> Tensor:
    """The map A (C, C/G) in float64, x = A u in each group.

    Args:
        covariance_CC: of the layer's input channels, each centered at its own mean, (C, C).
        std_C: sigma_b of the branch of each channel, positive, (C,).
        images: that the covariance was estimated from; the sample size of the shrinkage, as pixels of one image are
            far from independent.
        groups: of the layer; divides C.

    Raises:
        NumericsError: the covariance is not finite, or a group of channels does not vary.
    """
    channels = len(std_C) // groups
    maps: list[Tensor] = []
    for start in range(0, len(std_C), channels):
        group = slice(start, start + channels)
        sigma = covariance_CC[group, group].double()
        scale = 1 / std_C[group].double()
        s = scale.view(-1, 1) * sigma * scale
        if not s.isfinite().all() or not s.trace() > 0:
            where = f"covariance of channels {start}..{start + channels}"
            raise NumericsError(where, "is not finite, or zero")
        lambda_C, e_CC = torch.linalg.eigh(oas(s, images))
        root = e_CC * lambda_C.rsqrt() @ e_CC.mT
        variance = (root @ s).mul(root).sum()  # tr(root S root)
        maps.append((sigma.trace() / variance).sqrt() * root * scale)
    return torch.cat(maps)


def oas(s_CC: Tensor, samples: int) -> Tensor:
    """A sample covariance (C, C) shrunk towards its mean variance times the identity; positive definite for C > 1.

    The oracle approximating shrinkage estimator, Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE
    Covariance Estimation", 2010, equation 23.
    """
    channels = len(s_CC)
    trace, trace_of_square = s_CC.trace(), s_CC.square().sum()
    mean = trace / channels
    dispersion = trace_of_square - trace.square() / channels
    above = (1 - 2 / channels) * trace_of_square + trace.square()
    below = (samples + 1 - 2 / channels) * dispersion
    share = (above / below).clamp(max=1) if above < below else torch.ones_like(above)  # 0/0 where S is the target
    return (1 - share) * s_CC + share * mean * torch.eye(channels).to(s_CC)


def fold_map(v: Tensor, map_CC: Tensor) -> Tensor:
    """W from V, of v's shape (O, C/G, *K) and dtype, computed in the map's; differentiable in v."""
    w = _rows(v, map_CC).to(map_CC.dtype) @ _blocks(map_CC).to(v.device)
    return _weight(w, v).to(v.dtype)


def unfold_map(w: Tensor, map_CC: Tensor) -> Tensor:
    """V from W, of w's shape (O, C/G, *K), dtype and device: solved in float64 on the CPU, as Metal has none."""
    v = torch.linalg.solve(_blocks(map_CC).cpu().double(), _rows(w, map_CC).cpu().double(), left=False)
    return _weight(v, w).to(w)


def _blocks(map_CC: Tensor) -> Tensor:
    """(C, C/G) as (G, C/G, C/G)."""
    return map_CC.reshape(-1, map_CC.shape[1], map_CC.shape[1])


def _rows(weight: Tensor, map_CC: Tensor) -> Tensor:
    """A weight (O, C/G, *K) as (G, O/G * K, C/G): what each output channel and kernel position reads, by group."""
    groups = map_CC.shape[0] // map_CC.shape[1]
    return weight.reshape(*weight.shape[:2], -1).movedim(1, -1).reshape(groups, -1, weight.shape[1])


def _weight(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`, in the shape of `like`."""
    return rows.reshape(like.shape[0], -1, like.shape[1]).movedim(-1, 1).reshape(like.shape)
