"""Re-estimating the running statistics of BatchNorms.

Rewritten fusion weights change what the BatchNorms behind them see; BatchNorms that never saw data describe nothing.
Population statistics over the calibration images replace the exponential average (Wu & Johnson, "Rethinking 'Batch'
in BatchNorm", arXiv 2105.07576, section 3), merged by count so that the split into batches has no say.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equalize.eval_mode import eval_mode
from equalize.moments.blocks import Block, Blocks, as_blocks, rounds
from equalize.moments.moments import merge, promote
from equalize.moments.watch import Batch, Call, observe

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
    passes, as in a network that was never trained, the first levels share one, in which each BatchNorm normalizes
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
    with eval_mode(model):
        for level in _levels(norms, before or {}):
            gathered = {key: _Gathered(buffers, key) for key in level}
            apart = before is not None and all(not set(level) & set(before.get(key, level)) for key in level)
            _pass(model, gathered, as_blocks(batches), apart=apart)
            for each in gathered.values():
                values |= each.values() if each.calls else {}
    return values


def _pass(model: nn.Module, gathered: Mapping[str, "_Gathered"], blocks: Blocks, *, apart: bool) -> None:
    """Gathers what the BatchNorms see in all images; `apart` where none of them comes before another."""
    seen: list[Mapping[str, _Seen]] = []
    for part in rounds(blocks, decides=not apart):
        begun = [_observed(model, gathered, block) for block in part]  # an accelerator is waited for afterwards
        seen += part.gather([{key: each.cpu() for key, each in found.items()} for found in begun])
        if not apart or part.is_last:
            for key, each in gathered.items():
                each.adopt(_merged([found[key] for found in seen]))


def _observed(model: nn.Module, gathered: Mapping[str, "_Gathered"], block: Block) -> dict[str, "_Seen"]:
    """What the BatchNorms see in a block; in each call they normalize with what is gathered up to it."""
    for each in gathered.values():
        each.begin()
    found: dict[str, list[_Seen]] = {key: [] for key in gathered}
    for observed in observe(model, {key: each.see for key, each in gathered.items()}, block.batches, strict=False):
        for key, calls in observed.results.items():
            found[key] += calls
    return {key: _merged(calls) for key, calls in found.items()}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What a BatchNorm of C channels saw.

    Attributes:
        calls: in how many calls.
        count: how many numbers a channel.
        moments_2C: their mean and M2, float64; of no meaning where there are none.
    """

    calls: int
    count: int
    moments_2C: Tensor

    def cpu(self) -> "_Seen":
        return replace(self, moments_2C=self.moments_2C.cpu())


def _merged(parts: Sequence[_Seen]) -> _Seen:
    calls, some = sum(part.calls for part in parts), [part for part in parts if part.count]
    if not some:
        return _Seen(calls=calls, count=0, moments_2C=torch.zeros(2, 0))
    counts_P = torch.stack([part.moments_2C.new_full((), part.count) for part in some])  # no copy to an accelerator
    mean_C, q_CP = merge(counts_P, *torch.stack([part.moments_2C for part in some], dim=-1))
    count = sum(part.count for part in some)
    return _Seen(calls=calls, count=count, moments_2C=torch.stack([mean_C, q_CP.sum(-1)]))


class _Gathered:
    """What one BatchNorm saw in the blocks so far; its buffers hold the statistics of that.

    Attributes:
        keys: of its `running_mean`, `running_var` and `num_batches_tracked`.
    """

    def __init__(self, buffers: Mapping[str, Tensor], key: str) -> None:
        prefix = key.removesuffix("running_mean")
        self.keys = [prefix + name for name in ("running_mean", "running_var", "num_batches_tracked")]
        self._running_mean, self._running_var = buffers[self.keys[0]], buffers[self.keys[1]]
        self._tracked = buffers.get(self.keys[2])
        self._before = self._so_far = _merged([])

    @property
    def calls(self) -> int:
        """In how many calls it saw something."""
        return self._before.calls

    def begin(self) -> None:
        """A block begins; what other blocks of the same round saw is not known in it."""
        self._so_far = self._before

    def see(self, call: Call) -> _Seen:
        """The moments of a call's input (N, C, *); the BatchNorm then normalizes with those of all up to it."""
        x_CL = promote(call.data.movedim(1, 0).flatten(1))
        variance_C, mean_C = torch.var_mean(x_CL, dim=1, correction=0)
        moments_2C = torch.stack([mean_C.double(), variance_C.double() * x_CL.shape[1]])
        seen = _Seen(calls=1, count=x_CL.shape[1], moments_2C=moments_2C)
        self._so_far = _merged([self._so_far, seen])
        self._write(self._so_far)
        return seen

    def adopt(self, seen: _Seen) -> None:
        """Takes this for all that was seen."""
        self._before = replace(seen, moments_2C=seen.moments_2C.to(self._running_mean.device))
        self._write(self._before)

    def _write(self, seen: _Seen) -> None:
        if seen.count:
            mean_C, m2_C = seen.moments_2C
            self._running_mean.copy_(mean_C)
            self._running_var.copy_(m2_C / seen.count)

    def values(self) -> dict[str, Tensor]:
        """By key: running_mean and running_var (C,), num_batches_tracked ()."""
        found = [self._running_mean.clone(), self._running_var.clone()]
        if self._tracked is not None:
            found.append(torch.full_like(self._tracked, self.calls))
        return dict(zip(self.keys, found, strict=False))
