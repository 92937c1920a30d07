"""Plans carried out on a network in memory: the public `equalize.attach` and `equalize.apply`."""

import logging
import os
from pathlib import Path
from typing import overload

from torch import nn

from equalize.errors import InputError
from equalize.plan import apply as plan_apply
from equalize.plan import attach as plan_attach
from equalize.plan.plan import Plan
from equalize.wrappers import unwrapped

_LOGGER = logging.getLogger("equalize")

PlanLike = Plan | str | os.PathLike[str]
"""A plan, a directory that `equalize` wrote, or its `equalize.json`."""


@overload
def attach(plan: PlanLike, model: nn.Module, /) -> None: ...
@overload
def attach(model: nn.Module, plan: PlanLike, /) -> None: ...
@overload
def attach(*, plan: PlanLike, model: nn.Module) -> None: ...
def attach(*args: object, **kwargs: object) -> None:
    """Has the optimizer see the equalized weights V of each fusion layer; state dicts hold plain ones all the while.

    Build the optimizer before or afterwards: the parameters stay the objects that they are. Before, if it groups them
    by name: `named_parameters` calls an attached bias `parametrizations.bias.original`.

    Args:
        plan, model: in either order. The plan, or a directory or `equalize.json` that it is read from; the network
            that it was made for, perhaps wrapped by DistributedDataParallel or torch.compile.

    Raises:
        SiteError: the plan does not fit the network. InputError: something else was given, or no plan is there.
    """
    plan, model = _sorted("equalize.attach", args, kwargs)
    if not plan.equalized:
        _LOGGER.warning("equalize.attach: the plan equalizes no layer; the network is trained as it is")
    plan_attach.attach(plan, model)


@overload
def apply(plan: PlanLike, model: nn.Module, /) -> None: ...
@overload
def apply(model: nn.Module, plan: PlanLike, /) -> None: ...
@overload
def apply(*, plan: PlanLike, model: nn.Module) -> None: ...
def apply(*args: object, **kwargs: object) -> None:
    """Rewrites the tensors that a plan lists, in place; nothing for `preserve`.

    Args:
        plan, model: as of `attach`.

    Raises:
        SiteError, InputError: as of `attach`; SiteError also where an earlier call rewrote the weights.
        NumericsError: if a rewritten tensor is not finite in its dtype. The network is unchanged after any of them.
    """
    plan_apply.apply(*_sorted("equalize.apply", args, kwargs))


def _sorted(where: str, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Plan, nn.Module]:
    """The plan and the bare network among two arguments."""
    given = (*args, *kwargs.values())
    models = [each for each in given if isinstance(each, nn.Module)]
    plans = [each for each in given if isinstance(each, Plan | str | os.PathLike)]
    if len(given) != 2 or len(models) != 1 or len(plans) != 1 or not kwargs.keys() <= {"plan", "model"}:
        got = ", ".join(type(each).__name__ for each in given) or "nothing"
        is_checkpoint = any(type(each).__name__ == "Checkpoint" for each in given)
        expected = "a plan (or a directory with equalize.json) and a torch.nn.Module, in either order"
        raise InputError(
            where,
            "takes a plan and a network",
            got=got,
            expected=expected,
            remedy="give checkpoint.model" if is_checkpoint else None,
        )
    plan = plans[0]
    return plan if isinstance(plan, Plan) else Plan.read(Path(plan)), unwrapped(models[0])
