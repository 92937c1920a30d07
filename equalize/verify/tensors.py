"""Verifies written tensors: the original's keys and bits, except listed tensors, which must be what the plan makes."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from equalize.errors import NumericsError
from equalize.messages import first_of
from equalize.plan.apply import apply
from equalize.plan.plan import Plan


def check_tensors(original: Mapping[str, Tensor], written: Mapping[str, Tensor], listed: Iterable[str]) -> None:
    """Demands the same keys, dtypes and shapes, and the same bits in every tensor but the `listed`, which may be new.

    The NumericsError names the first three offenders and their number.
    """
    free = set(listed)
    _demand("are missing", sorted(set(original) - set(written)))
    _demand("were added", sorted(set(written) - set(original) - free))
    both = [key for key in original if key in written]
    other = [k for k in both if (original[k].dtype, original[k].shape) != (written[k].dtype, written[k].shape)]
    _demand("have another dtype or shape", other)
    fixed = [key for key in both if key not in free]
    changed = [key for key in fixed if not torch.equal(_bytes(original[key]), _bytes(written[key]))]
    _demand(
        "changed but are not in the plan", changed, "if it was not trained since, calibrate again from the original"
    )


def _demand(what: str, keys: Sequence[str], remedy: str = "calibrate again from the original") -> None:
    if keys:
        raise NumericsError(first_of(keys), f"{what} in what was written", remedy=remedy)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def check_planned(original: nn.Module, written: nn.Module, plan: Plan, *, stored: torch.dtype = torch.float32) -> None:
    """Demands that every tensor of the plan is what the plan makes of the original, to rounding.

    The plan is applied to `original`; `written` is as its library's own loader gives it; `stored` is the coarsest dtype
    that weights are stored in. The NumericsError names the first tensor that is something else.
    """
    apply(plan, original)
    expected = original.state_dict()
    resolution = torch.finfo(stored)
    relative, absolute = 4 * resolution.eps, resolution.smallest_normal * resolution.eps
    for key, tensor in written.state_dict().items():
        if key in plan.changed and not torch.allclose(tensor, expected[key].to(tensor), relative, absolute):
            raise NumericsError(
                plan.disk_keys.get(key, key),
                "is not what the plan makes of the original",
                remedy="apply the plan again",
            )
