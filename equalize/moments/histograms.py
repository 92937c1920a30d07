"""How the values of a branch are distributed, counted at the sampled positions.

A bin holds the float32 numbers of one sign and exponent whose fractions begin with the same four bits, so that every
bin is at most 1/16 of its values wide. Bins that do not depend on the data can be counted in any order and by any
number of processes: the counts add up exactly.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from equalize.moments.sampling import Samples
from equalize.sites.sites import Site

BINS = 2**13

_SHIFT = 32 - 13  # leaves sign, exponent and four bits of the fraction


def count_values(samples: Mapping[str, Sequence[Samples]], sites: Sequence[Site], images: int) -> dict[str, Tensor]:
    """The counts of each branch by layer, (B, BINS) int64 in ascending order of the values, on the samples' device.

    `samples` are of runs of each layer's input channels, in order, and finite; layers whose samples are not one row to
    each of the `images` are left out.
    """
    return {
        site.layer: _by_branch(samples[site.layer], site)
        for site in sites
        if samples.get(site.layer) and all(len(each.values_NPC) == images for each in samples[site.layer])
    }


def _by_branch(samples: Sequence[Samples], site: Site) -> Tensor:
    values_NPC = torch.cat([each.values_NPC for each in samples], dim=2)
    counts_BK = torch.stack([_count(values_NPC[..., branch.start : branch.stop]) for branch in site.branches])
    positive_BK, negative_BK = counts_BK.chunk(2, dim=1)
    return torch.cat([negative_BK.flip(1), positive_BK], dim=1)


def _count(values: Tensor) -> Tensor:
    """Counts by the first bits of each value: the positive ones, then the negative ones, from zero to infinity."""
    bits = values.float().contiguous().view(torch.int32)
    return torch.bincount((bits >> _SHIFT).bitwise_and_(BINS - 1).flatten(), minlength=BINS)


@cache
def bin_edges() -> Tensor:
    """The ends of the bins, (BINS + 1,) float64 in ascending order; what lies beyond float32 is cut off at its end."""
    positive = (torch.arange(BINS // 2, dtype=torch.int32) << _SHIFT).view(torch.float32).double()
    positive = positive.nan_to_num_(nan=torch.finfo(torch.float32).max)
    positive = torch.cat([positive, positive[-1:]]).clamp_(max=torch.finfo(torch.float32).max)
    return torch.cat([-positive[1:].flip(0), positive])
