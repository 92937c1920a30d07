"""Re-estimating the running statistics of BatchNorms.

Rewritten fusion weights change what the BatchNorms behind them see; BatchNorms that never saw data describe nothing.
Population statistics over the calibration images replace the exponential average (Wu & Johnson, "Rethinking 'Batch'
in BatchNorm", arXiv 2105.07576, section 3), merged by count so that the split into batches has no say.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equalize.taps import Batch, Call, run, undisturbed

__all__ = ["estimate_norms", "untouched_norms"]


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


def estimate_norms(model: nn.Module, norms: Sequence[str], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The statistics that the named BatchNorms would have over all images.

    Each normalises with what it has gathered so far, the current batch included, so that those behind it see
    normalised inputs from the first batch on.

    Args:
        model: run in eval mode; left as it was.
        norms: `running_mean` keys.
        batches: the network's own inputs.

    Returns:
        By state-dict key, for those that were called: `running_mean`, `running_var` (C,), `num_batches_tracked` ().
    """
    if not norms:
        return {}
    buffers = dict(model.named_buffers())
    gathered = {key: _Gathered(buffers, key) for key in norms}
    values: dict[str, Tensor] = {}
    with undisturbed(model):
        handlers = {key: partial(_Gathered.add, gathered[key]) for key in norms}
        for _ in run(model, handlers, batches, strict=False):
            pass
        for each in gathered.values():
            values |= each.values() if each.calls else {}
    return values


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
