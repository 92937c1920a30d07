"""Re-estimating the running statistics of BatchNorms.

Rewritten fusion weights change what the BatchNorms behind them see; BatchNorms that never saw data describe nothing.
Population statistics over the calibration images replace the exponential average (Wu & Johnson, "Rethinking 'Batch'
in BatchNorm", arXiv 2105.07576, section 3), merged by count so that the split into batches has no say.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equalize.moments.blocks import Block, Blocks, as_blocks, each_block
from equalize.moments.watch import Batch, Call, run, undisturbed

__all__ = ["estimate_norms", "untouched_norms"]

_MOST_PASSES = 12


def untouched_norms(model: nn.Module) -> list[str]:
    """`running_mean` keys of the BatchNorms that never saw data.

    A zero `num_batches_tracked` alone does not say so: checkpoints converted from other frameworks have it too.
    """
    return [
        f"{path}.running_mean" if path else "running_mean"
        for path, module in nn.Module.named_modules(model)
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
    batches: Iterable[Batch] | Blocks,
    before: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Tensor]:
    """The statistics that the named BatchNorms would have over all images.

    One pass over the images for all BatchNorms that have no other of them before them, another for those that have
    only these before them, and so on: each is estimated on what it will see. Where that would take more than a dozen
    passes, as in a network that was never trained, the first levels share one, in which each BatchNorm normalises
    with what was gathered in the rounds before and in its own block.

    Args:
        model: run in eval mode; left as it was.
        norms: `running_mean` keys.
        batches: the network's own inputs; iterated once a pass. `Blocks` may be shared by several processes.
        before: for each key, those of the BatchNorms that reach it, as `Scan.norms` has them.

    Returns:
        By state-dict key, for those that were called: `running_mean`, `running_var` (C,), `num_batches_tracked` ().
    """
    buffers = dict(nn.Module.named_buffers(model))
    values: dict[str, Tensor] = {}
    with undisturbed(model):
        for level in _levels(norms, before or {}):
            gathered = {key: _Gathered(buffers, key) for key in level}
            look = partial(_adopt, gathered)
            apart = before is not None and all(not set(level) & set(before.get(key, level)) for key in level)
            results = each_block(as_blocks(batches), partial(_begin, model, gathered), None if apart else look)
            look(results)
            for each in gathered.values():
                values |= each.values() if each.calls else {}
    return values


def _begin(model: nn.Module, gathered: Mapping[str, "_Gathered"], block: Block) -> Callable[[], "_Statistics"]:
    """What the BatchNorms of a level see in a block; in each call they normalise with what is gathered up to it."""
    for each in gathered.values():
        each.begin()
    handlers = {key: each.add for key, each in gathered.items()}
    for _ in run(model, handlers, block.batches, strict=False):
        pass
    seen = {key: (each.block.calls, each.block.count, each.block.moments_2C) for key, each in gathered.items()}
    return lambda: {key: (calls, count, moments_2C.cpu()) for key, (calls, count, moments_2C) in seen.items()}


def _adopt(gathered: Mapping[str, "_Gathered"], results: Sequence["_Statistics"]) -> bool:
    """Merges the blocks in their order, and lets the BatchNorms normalise with that."""
    for key, each in gathered.items():
        each.adopt([result[key] for result in results])
    return False


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


_Statistics = dict[str, tuple[int, int, Tensor]]
"""Of one block, by `running_mean` key: calls, numbers a channel, and (2, C) their mean and M2, float64 on the CPU."""


class _Merged:
    """Per-channel moments (2, C), mean and M2, with the update of Chan, Golub & LeVeque as in moments.py."""

    def __init__(self, moments_2C: Tensor, count: int = 0, calls: int = 0) -> None:
        self.moments_2C = moments_2C.clone()
        self.count = count
        self.calls = calls

    def add(self, calls: int, count: int, moments_2C: Tensor) -> None:
        """Further numbers."""
        if count:
            total = self.count + count
            (mean_C, m2_C), (more_C, m2_more_C) = self.moments_2C, moments_2C
            delta_C = more_C - mean_C
            m2_C += m2_more_C + delta_C.square() * (self.count * count / total)
            mean_C += delta_C * (count / total)
            self.count = total
        self.calls += calls


class _Gathered:
    """What one BatchNorm saw; kept in its buffers as it grows."""

    def __init__(self, buffers: dict[str, Tensor], key: str) -> None:
        prefix = key.removesuffix("running_mean")
        self.keys = [prefix + name for name in ("running_mean", "running_var", "num_batches_tracked")]
        self.running_mean, self.running_var = buffers[self.keys[0]], buffers[self.keys[1]]
        self.tracked = buffers.get(self.keys[2])
        self._nothing_2C = self.running_mean.new_zeros((2, *self.running_mean.shape), dtype=torch.float64)
        self._before = self.block = self._so_far = _Merged(self._nothing_2C)

    @property
    def calls(self) -> int:
        return self._before.calls

    def begin(self) -> None:
        """A block begins."""
        self.block = _Merged(self._nothing_2C)
        self._so_far = _Merged(self._before.moments_2C, self._before.count)

    def add(self, call: Call) -> None:
        x_CL = call.data.movedim(1, 0).flatten(1)
        x_CL = x_CL if x_CL.dtype == torch.float64 else x_CL.float()
        variance_C, mean_C = torch.var_mean(x_CL, dim=1, correction=0)
        moments_2C = torch.stack([mean_C.double(), variance_C.double() * x_CL.shape[1]])
        for merged in (self.block, self._so_far):
            merged.add(1, x_CL.shape[1], moments_2C)
        self._write(self._so_far)

    def adopt(self, blocks: Sequence[tuple[int, int, Tensor]]) -> None:
        """Takes these blocks, and no others, for all there is."""
        merged = _Merged(self._nothing_2C.cpu())
        for block in blocks:
            merged.add(*block)
        self._before = _Merged(merged.moments_2C.to(self._nothing_2C), merged.count, merged.calls)
        if merged.count:
            self._write(self._before)

    def _write(self, merged: _Merged) -> None:
        mean_C, m2_C = merged.moments_2C
        self.running_mean.copy_(mean_C)
        self.running_var.copy_(m2_C / merged.count)

    def values(self) -> dict[str, Tensor]:
        statistics = [self.running_mean.clone(), self.running_var.clone()]
        if self.tracked is not None:
            statistics.append(torch.full_like(self.tracked, self.calls))
        return dict(zip(self.keys, statistics, strict=False))
