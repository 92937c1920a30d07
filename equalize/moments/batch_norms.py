"""Re-estimates the running statistics of BatchNorms.

Rewritten fusion weights change what the BatchNorms behind them see; BatchNorms that never saw data describe nothing.
Population statistics over the calibration images replace the exponential average (Wu & Johnson, "Rethinking 'Batch'
in BatchNorm", arXiv 2105.07576, section 3), merged by count, so that they do not depend on the split into batches.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equalize.errors import NumericsError, SiteError
from equalize.eval_mode import eval_mode
from equalize.moments.blocks import Block, Blocks, as_blocks, is_due, rounds
from equalize.moments.moments import merge, promote
from equalize.moments.watch import Batch, Call, images_in, observe

_MOST_PASSES = 12
DEAD = 1e-12  # stands for the variance of a dead channel


def untouched_norms(model: nn.Module) -> list[str]:
    """`running_mean` keys of the BatchNorms that never saw data.

    A zero `num_batches_tracked` alone is not enough: checkpoints converted from other frameworks have it too.
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
    before: Mapping[str, Collection[str]],
    *,
    tolerance: float = 0.0,
    names: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The statistics that the named BatchNorms would have over all images.

    One pass over the images for all BatchNorms that have no other of them before them, another for those that have
    only these before them, and so on: each is estimated on what it will see. Where that would take more than a dozen
    passes, as in a network that was never trained, the first levels share one, in which each BatchNorm normalizes
    with the statistics of the batch: there, and only there, the split into batches has a say.

    Args:
        model: run in eval mode; left as it was.
        norms: `running_mean` keys.
        batches, names: as of `measure`; iterated once a pass.
        before: for each key, those of the BatchNorms that reach it, as `Scan.norms` has them.
        tolerance: end a pass as soon as what each of its BatchNorms gives is known this well: the standard error, root
            mean square over channels and in units of their standard deviation, that mean and standard deviation leave.
            Decided whenever another 32 images are through; 0 for all images. They should come in random order.

    Returns:
        By state-dict key, for those that were called: `running_mean`, `running_var` (C,), `num_batches_tracked` ().

    Raises:
        NumericsError: at the first non-finite value, with the BatchNorm and the image.
        SiteError: one that was traced, by `before`, was not seen: its call is hidden, or another input leads past it.
    """
    buffers = dict(nn.Module.named_buffers(model, remove_duplicate=False))
    norms, before = _under_one_name(buffers, norms, before)
    values: dict[str, Tensor] = {}
    with eval_mode(model):
        for level in _levels(norms, before):
            apart = not any(set(level) & set(before.get(key, level)) for key in level)
            found = _pass(model, buffers, level, as_blocks(batches, names), by_batch=not apart, tolerance=tolerance)
            if unseen := next((key for key in level if key in before and key not in found), None):
                what = "is to be re-estimated, and its BatchNorm was not seen when the network ran (in TorchScript?)"
                raise SiteError(unseen, what, remedy="give it as a plain module, or use --strategy preserve")
            estimated = {
                name: value for key, seen in found.items() for name, value in _estimated(buffers, key, seen).items()
            }
            values |= estimated
            for name, value in estimated.items():
                buffers[name].copy_(value)
    return values


def _under_one_name(
    buffers: Mapping[str, Tensor], norms: Sequence[str], before: Mapping[str, Collection[str]]
) -> tuple[list[str], dict[str, set[str]]]:
    """Both by the first name of each BatchNorm: a network may hold one module under several."""
    first: dict[int, str] = {}
    name = {key: first.setdefault(id(buffer), key) for key, buffer in buffers.items()}
    merged: dict[str, set[str]] = {}
    for key, others in before.items():
        merged.setdefault(name.get(key, key), set()).update(name.get(other, other) for other in others)
    return list(dict.fromkeys(name[key] for key in norms)), merged


class SeenByNorm(NamedTuple):
    """What the BatchNorm of a `running_mean` saw in a call.

    N images, or other rows, have `number` numbers a channel each; `moments_2NC` are their means and variances.
    """

    key: str
    number: int
    moments_2NC: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """Mean and variance of all numbers that a BatchNorm saw, (C,) float64, and its error, see `estimate_norms`."""

    mean_C: Tensor
    variance_C: Tensor
    error: float


def _pass(
    model: nn.Module,
    buffers: Mapping[str, Tensor],
    level: Sequence[str],
    blocks: Blocks,
    *,
    by_batch: bool,
    tolerance: float,
) -> dict[str, list[SeenByNorm]]:
    """What each BatchNorm sees in all images; `by_batch` if it normalizes them with the statistics of their batch."""
    observers = {key: partial(see_moments, key, _running(buffers, key) if by_batch else ()) for key in level}
    found: dict[str, list[SeenByNorm]] = {}
    rows = 0  # of the BatchNorm that is called first: its images
    for part in rounds(blocks, decides=tolerance > 0):
        begun = [(block, _observed(model, observers, block)) for block in part]  # without waiting for the accelerator
        gathered = part.gather([_finite(one, block) for block, one in begun])
        for each in itertools.chain.from_iterable(gathered):
            found.setdefault(each.key, []).append(each)
        before, rows = rows, sum(each.moments_2NC.shape[1] for each in next(iter(found.values()), ()))
        if (
            tolerance > 0
            and is_due(before, rows)
            and all(pool_seen(each).error <= tolerance for each in found.values())
        ):
            break
    return found


def _observed(
    model: nn.Module, observers: Mapping[str, Callable[[Call], SeenByNorm]], block: Block
) -> list[list[SeenByNorm]]:
    passes = observe(model, observers, block.batches, strict=False)
    return [[seen for calls in each.results.values() for seen in calls if seen.number] for each in passes]


def _finite(passes: Sequence[Sequence[SeenByNorm]], block: Block) -> list[SeenByNorm]:
    """What a block's batches say, on the CPU; a NumericsError names the first BatchNorm and image with a NaN or inf."""
    first, done = 0, list[SeenByNorm]()
    for batch, seen in zip(block.batches, passes, strict=True):
        for each in seen:
            done.append(each._replace(moments_2NC=each.moments_2NC.cpu()))
            bad_N = ~done[-1].moments_2NC.isfinite().all(2).all(0)
            if bad_N.any():
                image = first + int(bad_N.nonzero()[0]) * images_in(batch) // len(bad_N)
                name = block.names[image] if image < len(block.names) else block.first + image
                remedy = "check that image and the weights before this layer, or measure in float32"
                where = each.key.removesuffix(".running_mean")
                raise NumericsError(where, "gets non-finite values", got=f"image {name}", remedy=remedy)
        first += images_in(batch)
    return done


def _running(buffers: Mapping[str, Tensor], key: str) -> tuple[Tensor, ...]:
    """The `running_mean` and `running_var` of the BatchNorm with this `running_mean`, (C,) each."""
    return buffers[key], buffers[key.removesuffix("mean") + "var"]


def see_moments(key: str, running: Sequence[Tensor], call: Call) -> SeenByNorm:
    """The moments of a call's input (N, C, *); `running`, if given, becomes what the BatchNorm normalizes with."""
    x_NCL = promote(call.data).unsqueeze(-1).flatten(2)
    variance_NC, mean_NC = torch.var_mean(x_NCL, dim=2, correction=0)
    mean_C = mean_NC.mean(0)
    variance_C = (variance_NC + (mean_NC - mean_C).square()).mean(0)
    for buffer, value_C in zip(running, (mean_C, variance_C), strict=False):
        buffer.copy_(value_C)
    return SeenByNorm(key, x_NCL.shape[2] * bool(len(x_NCL)), torch.stack([mean_NC, variance_NC]))


def pool_seen(seen: Sequence[SeenByNorm]) -> Population:
    """All rows together; the error of ratio estimators, as in `moments.pool`."""
    counts_P = torch.cat([torch.full(each.moments_2NC.shape[1:2], each.number, dtype=torch.float64) for each in seen])
    mean_CP, variance_CP = torch.cat([each.moments_2NC.double() for each in seen], dim=1).transpose(1, 2)  # on the CPU
    mean_C, q_CP = merge(counts_P, mean_CP, variance_CP * counts_P)
    variance_C = q_CP.sum(1) / counts_P.sum()
    deviation_CP = (mean_CP - mean_C.unsqueeze(1)) / variance_C.sqrt().unsqueeze(1)
    half_CP = (q_CP / (counts_P * variance_C.unsqueeze(1)) - 1) / 2  # of a row, in the standard deviation
    rows = len(counts_P)
    error_C = (counts_P * (deviation_CP.square() + half_CP.square()).mul(counts_P)).sum(1) / counts_P.sum().square()
    error = error_C[variance_C > DEAD].mul(rows / max(1, rows - 1)).mean().sqrt() if rows > 1 else math.inf
    return Population(mean_C=mean_C, variance_C=variance_C, error=float(error))


def _estimated(buffers: Mapping[str, Tensor], key: str, seen: Sequence[SeenByNorm]) -> dict[str, Tensor]:
    """The statistics of one BatchNorm, by key, in the types and on the device of its own."""
    pooled = pool_seen(seen)
    prefix = key.removesuffix("running_mean")
    estimated = {"running_mean": pooled.mean_C, "running_var": pooled.variance_C}
    named = {prefix + name: value.to(buffers[prefix + name]) for name, value in estimated.items()}
    tracked = buffers.get(f"{prefix}num_batches_tracked")
    return named if tracked is None else named | {f"{prefix}num_batches_tracked": torch.full_like(tracked, len(seen))}


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
