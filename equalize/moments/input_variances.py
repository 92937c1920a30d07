"""Compares what trained BatchNorms see with what they were trained on: is the input scaled as in the training?"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from equalize.eval_mode import eval_mode
from equalize.moments.batch_norms import DEAD, SeenByNorm, pool_seen, see_moments
from equalize.moments.watch import Batch, Call, observe

# Seen so far: right inputs up to 0.6 and, of very dim images, 1.5 in the first; wrongly scaled ones from 1.8 on.
_LARGEST_DEVIATION = 1.0
_LARGEST_FIRST = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceCheck:
    """How the variances that trained BatchNorms see compare with those that they were trained on.

    Attributes:
        norms: how many were compared; 0 where none has statistics of a training.
        deviation: the median over them of |log10(seen / trained)|, each the mean over channels; 0 where there are none.
        first: that of the one that is called first, which no activation stands before: behind a ReLU6 or a sigmoid
            variances stay what they were, whatever the scale of the input is.
    """

    norms: int
    deviation: float
    first: float

    @property
    def is_wrong(self) -> bool:
        """Whether the input is not scaled as in the training."""
        return self.deviation > _LARGEST_DEVIATION or self.first > _LARGEST_FIRST


def check_variances(model: nn.Module, batches: Iterable[Batch]) -> VarianceCheck:
    """Compares the variance that each BatchNorm sees in a few images with its `running_var`; changes nothing.

    Wrongly scaled inputs are off by powers of ten in most BatchNorms; images of another kind, in the right scale, are
    not. Those that never saw data, or whose variances are all exactly 1, do not count. A variance that agrees as soon
    as the share of the 1 it started from, (1 - momentum)^batches, is added, agrees.
    """
    trained = {
        f"{path}.running_mean" if path else "running_mean": module
        for path, module in nn.Module.named_modules(model)
        if isinstance(module, _BatchNorm) and module.running_var is not None and bool((module.running_var != 1).any())
    }
    found: dict[str, list[SeenByNorm]] = {}  # in the order of the calls

    def see(key: str, call: Call) -> None:
        found.setdefault(key, []).append(see_moments(key, (), call))

    with eval_mode(model):
        for _ in observe(model, {key: partial(see, key) for key in trained}, batches if trained else (), strict=False):
            pass
    deviations = [_deviation(trained[key], seen) for key, seen in found.items()]
    median, first = (statistics.median(deviations), deviations[0]) if deviations else (0.0, 0.0)
    return VarianceCheck(norms=len(deviations), deviation=median, first=first)


def _deviation(norm: _BatchNorm, seen: Sequence[SeenByNorm]) -> float:
    seen = [each._replace(moments_2NC=each.moments_2NC.cpu()) for each in seen]
    assert norm.running_var is not None
    trained_C, seen_C = norm.running_var.cpu(), pool_seen(seen).variance_C
    count, momentum = norm.num_batches_tracked, norm.momentum
    start = 0.0 if momentum is None or not count else (1 - momentum) ** int(count)  # files may lack the count
    log_C = (trained_C + DEAD).log10()
    expected = (seen_C, start + (1 - start) * seen_C)
    return min(float(((each_C.to(trained_C) + DEAD).log10() - log_C).mean().abs()) for each_C in expected)
