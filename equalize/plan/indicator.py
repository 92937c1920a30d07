"""Will equalizing help? The variance of the labels that gradient descent explains in t steps, before and after.

A linear readout of the fusion layer's input channels is trained on the labels from zero, with the largest step that is
stable. Adam divides each channel's step by the root of its gradient's second moment, which goes with the channel's
variance; that is a change of coordinates q. With Sigma the channels' covariance, B their covariance with the labels Y:

    q_j = Sigma_jj^(-p)  (p = 0 for SGD, 1/4 for Adam),  A = q Sigma q,  B' = q B
    E_t = sum_i |e_i' B'|^2 / lambda_i [1 - (1 - lambda_i/lambda_max)^(2t)] / E|Y - mean Y|^2
    delta = E_t(D Sigma D, D B) - E_t(Sigma, B),  D = diag(1/sigma_b)

with the eigenpairs (lambda_i, e_i) of A. docs/design.md has the derivation, and what stands for B without labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from equalize.moments.covariance import InputStatistics, SplitStatistics
from equalize.moments.measured import Expectation, MeasuredSite

GAIN = 0.03
"""From this delta on, a gain is expected."""
NOTHING = 0.01
"""Below this delta, nothing is."""

STEPS = 100
Optimizer = Literal["adamw", "sgd"]
"""What the network will be trained with."""

_POWER: dict[Optimizer, float] = {"adamw": 0.25, "sgd": 0.0}
_MOST_DECOMPOSED = 1024  # channels; with more, taking the steps is faster than an eigendecomposition
_PROBES = 16  # random targets a branch, where there are no labels and the steps are taken
_Measured = TypeVar("_Measured", bound=MeasuredSite)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readout:
    """A linear regression of targets on channels.

    Attributes:
        sigma_CC: covariance of the channels. b_CK: with the targets. Both float64.
        weight_K: of each target; the shares of variance that are explained are summed with it.
    """

    sigma_CC: Tensor
    b_CK: Tensor
    weight_K: Tensor

    def scaled(self, factor_C: Tensor) -> "Readout":
        """The same of channels that are multiplied by a factor each."""
        sigma_CC = factor_C.unsqueeze(1) * self.sigma_CC * factor_C
        return replace(self, sigma_CC=sigma_CC, b_CK=factor_C.unsqueeze(1) * self.b_CK)


def explained(readout: Readout, optimizer: Optimizer = "adamw", steps: int = STEPS) -> float:
    """E_t: the share of the targets' variance that so many steps explain."""
    variance_C = readout.sigma_CC.diagonal()
    q_C = torch.where(variance_C > 0, variance_C.clamp_min(torch.finfo().tiny) ** -_POWER[optimizer], 0.0)
    whitened = readout.scaled(q_C)
    if len(q_C) <= _MOST_DECOMPOSED:
        lambda_C, e_CC = torch.linalg.eigh(whitened.sigma_CC)
        rate_C = (lambda_C / lambda_C[-1]).clamp(0, 1)
        energy_C = ((e_CC.T @ whitened.b_CK).square() * readout.weight_K).sum(1)
        # (1 - (1 - r)^2t)/lambda goes to 2t/lambda_max where lambda does to 0
        gained_C = torch.where(rate_C > 1e-12, -torch.expm1(2 * steps * torch.log1p(-rate_C)) / rate_C, 2.0 * steps)
        return float((energy_C * gained_C).sum() / lambda_C[-1])
    largest = _largest_eigenvalue(whitened.sigma_CC)
    w_CK = torch.zeros_like(whitened.b_CK)
    for _ in range(steps):
        w_CK += (whitened.b_CK - whitened.sigma_CC @ w_CK) / largest
    gained_K = (w_CK * (2 * whitened.b_CK - whitened.sigma_CC @ w_CK)).sum(0)
    return float((gained_K * readout.weight_K).sum())


def gained(site: MeasuredSite, statistics: InputStatistics, optimizer: Optimizer = "adamw") -> float | None:
    """delta: what equalizing a site's branches adds to E_100; None where nothing can be said.

    That is where a branch is constant, nothing was sampled, or all labels are the same.
    """
    labels = statistics.cross_CK.shape[1]
    if not statistics.positions or (labels and statistics.label_variance <= 0):
        return None
    if not all(branch.std > 0 for branch in site.branches):
        return None
    raw = _of_labels(site, statistics) if labels else _of_branches(site, statistics)
    of_C = _branch_of(site, raw.sigma_CC.device)
    sigma_B = torch.tensor([branch.std for branch in site.branches], dtype=torch.float64, device=of_C.device)
    return explained(raw.scaled(1 / sigma_B[of_C]), optimizer) - explained(raw, optimizer)


def with_expectation(site: _Measured, statistics: SplitStatistics | None, optimizer: Optimizer = "adamw") -> _Measured:
    """The site with what is to be expected of equalizing it.

    `gain` from `GAIN` on, `nothing` below `NOTHING`, where each half of the images says the same; else `unclear`.
    """
    if statistics is None:
        return site
    deltas = [gained(site, each, optimizer) for each in (statistics.whole, *statistics.halves)]
    sides = {_side(each) for each in deltas}
    return replace(site, delta=deltas[0], expect=sides.pop() if len(sides) == 1 else "unclear")


def expected_of_all(sites: Sequence[MeasuredSite]) -> tuple[Expectation, float | None]:
    """For the network: a gain if any site gains, nothing if none does; and the largest delta."""
    sides = {site.expect for site in sites}
    known = [site.delta for site in sites if site.delta is not None]
    side: Expectation = "gain" if "gain" in sides else "unclear" if "unclear" in sides else "nothing"
    return side, max(known, default=None)


def _side(value: float | None) -> Expectation:
    if value is None or NOTHING <= value < GAIN or not math.isfinite(value):
        return "unclear"
    return "gain" if value >= GAIN else "nothing"


def _of_labels(site: MeasuredSite, statistics: InputStatistics) -> Readout:
    """Each group of a grouped layer reads the labels from its own channels; the mean over the groups."""
    k = statistics.cross_CK.shape[1]
    weight_K = statistics.cross_CK.new_full((k,), 1 / (statistics.label_variance * site.groups))
    return Readout(sigma_CC=_in_groups(site, statistics), b_CK=statistics.cross_CK, weight_K=weight_K)


def _of_branches(site: MeasuredSite, statistics: InputStatistics) -> Readout:
    """Targets of unit energy for each branch: every standardized channel of a branch, the mean over them, then over
    the branches; which is the expectation over random targets that are linear in one branch's standardized channels.
    """
    sigma_CC = _in_groups(site, statistics)
    variance_C = sigma_CC.diagonal()
    varies_C = variance_C > 0
    of_C = _branch_of(site, sigma_CC.device)[varies_C]
    count_B = torch.bincount(of_C, minlength=len(site.branches))
    weight_K = 1 / (count_B[of_C] * (count_B > 0).sum()).double()
    b_CK = sigma_CC[:, varies_C] / variance_C[varies_C].sqrt()
    if len(sigma_CC) > _MOST_DECOMPOSED:
        signs = torch.randint(2, (_PROBES, len(of_C)), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        probes_PK = signs.to(b_CK) * (weight_K / _PROBES).sqrt()
        by_branch = [b_CK[:, of_C == branch] @ probes_PK[:, of_C == branch].T for branch in range(len(count_B))]
        b_CK = torch.cat(by_branch, dim=1)
        weight_K = torch.ones(b_CK.shape[1]).to(b_CK)
    return Readout(sigma_CC=sigma_CC, b_CK=b_CK, weight_K=weight_K)


def _in_groups(site: MeasuredSite, statistics: InputStatistics) -> Tensor:
    """The covariance of channels that one output reads together; 0 for others."""
    channels = len(statistics.mean_C)
    if site.groups == 1:
        return statistics.covariance_CC
    group_C = torch.arange(channels, device=statistics.mean_C.device) // (channels // site.groups)
    return statistics.covariance_CC * (group_C.unsqueeze(1) == group_C)


def _branch_of(site: MeasuredSite, device: torch.device) -> Tensor:
    """The index of each channel's branch, (C,)."""
    widths = torch.tensor([branch.stop - branch.start for branch in site.branches])
    return torch.arange(len(widths)).repeat_interleave(widths).to(device)


def _largest_eigenvalue(a_CC: Tensor) -> float:
    from scipy.sparse.linalg import eigsh  # not for every command: importing it takes long

    start_C = torch.randn(len(a_CC), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (largest,) = eigsh(a_CC.cpu().numpy(), k=1, v0=start_C.numpy(), tol=1e-6, return_eigenvectors=False)
    return float(largest)
