"""Re-estimating the running statistics of BatchNorms.

Rewritten fusion weights change what the BatchNorms behind them see; BatchNorms that never saw data describe nothing.
Population statistics over the calibration images replace the exponential average (Wu & Johnson, "Rethinking 'Batch'
in BatchNorm", arXiv 2105.07576, section 3), merged by count so that the split into batches has no say.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equalize.taps import Batch, Call, run, undisturbed

__all__ = ["estimate_norms", "untouched_norms"]

_MOST_PASSES = 12


def untouched_norms(model: nn.Module) -> list[str]:
    """`running_mean` keys of the BatchNorms that never saw data.

    A zero `num_batches_tracked` alone does not say so: checkpoints converted from other frameworks have it too.
    """
    return [
        f"{path}.running_mean" if path else "running_mean"
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
        and (module.num_batches_tracked is None or not module.num_batches_tracked)
        and not module.running_mean.any()
        and bool((module.running_var == 1).all())
    ]


def estimate_norms(
    model: nn.Module,
    norms: Sequence[str],
    batches: Iterable[Batch],
    before: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Tensor]:
    """The statistics that the named BatchNorms would have over all images.

    One pass over the images for all BatchNorms that have no other of them before them, another for those that have
    only these before them, and so on: each is estimated on what it will see. Where that would take more than a dozen
    passes, as in a network that was never trained, the first levels share one, in which each BatchNorm normalises
    with what it has gathered so far.

    Args:
        model: run in eval mode; left as it was.
        norms: `running_mean` keys.
        batches: the network's own inputs; iterated once a pass.
        before: for each key, those of the BatchNorms that reach it, as `Scan.norms` has them.

    Returns:
        By state-dict key, for those that were called: `running_mean`, `running_var` (C,), `num_batches_tracked` ().
    """
    buffers = dict(model.named_buffers())
    values: dict[str, Tensor] = {}
    with undisturbed(model):
        for level in _levels(norms, before or {}):
            gathered = {key: _Gathered(buffers, key) for key in level}
            handlers = {key: partial(_Gathered.add, gathered[key]) for key in level}
            for _ in run(model, handlers, batches, strict=False):
                pass
            for each in gathered.values():
                values |= each.values() if each.calls else {}
    return values


def _levels(norms: Sequence[str], before: Mapping[str, Collection[str]]) -> list[list[str]]:
    """The norms in groups that can share a pass, in order."""
    levels: list[list[str]] = []
    waiting = dict.fromkeys(norms)
    while waiting:
        ready = [key for key in waiting if not waiting.keys() & (set(before.get(key, ())) - {key})]
        levels.append(ready or list(waiting))  # a BatchNorm used twice may stand before itself and others
        waiting = {key: None for key in waiting if key not in levels[-1]}
    excess = len(levels) - _MOST_PASSES
    return [[key for level in levels[: excess + 1] for key in level], *levels[excess + 1 :]] if excess > 0 else levels


class _Gathered:
    """Per-channel moments of one BatchNorm's input, written into its buffers as they grow."""

    def __init__(self, buffers: dict[str, Tensor], key: str) -> None:
        prefix = key.removesuffix("running_mean")
        self.keys = [prefix + name for name in ("running_mean", "running_var", "num_batches_tracked")]
        self.running_mean, self.running_var = buffers[self.keys[0]], buffers[self.keys[1]]
        self.tracked = buffers.get(self.keys[2])
        self.calls = 0
        self.count = 0
        self.mean_C = torch.zeros_like(self.running_mean, dtype=torch.float64)
        self.m2_C = torch.zeros_like(self.mean_C)

    def add(self, call: Call) -> None:
        x_CL = call.data.movedim(1, 0).flatten(1)
        x_CL = x_CL if x_CL.dtype == torch.float64 else x_CL.float()
        count = x_CL.shape[1]
        variance_C, mean_C = torch.var_mean(x_CL, dim=1, correction=0)
        delta_C = mean_C.double() - self.mean_C  # Chan, Golub & LeVeque, as in moments.py
        total = self.count + count
        self.mean_C += delta_C * (count / total)
        self.m2_C += variance_C.double() * count + delta_C.square() * (self.count * count / total)
        self.count = total
        self.calls += 1
        self.running_mean.copy_(self.mean_C)
        self.running_var.copy_(self.m2_C / total)

    def values(self) -> dict[str, Tensor]:
        statistics = [self.running_mean.clone(), self.running_var.clone()]
        if self.tracked is not None:
            statistics.append(torch.full_like(self.tracked, self.calls))
        return dict(zip(self.keys, statistics, strict=False))
