"""Carrying out a plan's edits on a model, or on any mapping of tensors."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from equalize.errors import NumericsError, SiteError
from equalize.graph.recorder import named_tensors
from equalize.plan.draw import redraw
from equalize.plan.edits import Add, Draw, Edit, Scale, ScaleInputs, Set
from equalize.plan.equation import Geometry, per_channel, scale_inputs
from equalize.plan.parametrization import demand_folded
from equalize.plan.plan import Plan
from equalize.plan.rewritten import demand_not_rewritten, remember_rewritten
from equalize.sites.sites import Site

_PART = 1 << 21  # elements that are held in float64 at a time


def apply(plan: Plan, model: nn.Module) -> None:
    """Rewrites the tensors that `plan` lists, in place; nothing for `preserve`.

    Raises:
        SiteError: if the plan does not fit the model, is attached to it or rewrote it before; it is then unchanged.
        NumericsError: if a rewritten tensor is not finite in its dtype; the model is then unchanged.
    """
    demand_folded(model)
    demand_fit(plan, model)
    demand_not_rewritten(model, (edit.tensor for edit in plan.edits))
    with undone_on_failure(model) as before:
        apply_edits(plan.edits, model, before)
    remember_rewritten(model, plan.edits)


def demand_fit(plan: Plan, model: nn.Module) -> None:
    """Refuses a plan that names what a model has not, by a SiteError that names it."""
    tensors = named_tensors(model)
    for site in plan.sites:
        demand_weight(site, tensors)
    for edit in plan.edits:
        _demand_fit(edit, tensors)


def apply_edits(edits: Sequence[Edit], model: nn.Module, before: MutableMapping[str, Tensor] | None = None) -> None:
    """Carries out edits in order, each computed in float64 on the CPU (Metal has none) and cast back once.

    `before` gets a copy of each tensor as it was before its first edit.
    """
    tensors = named_tensors(model)
    layers: dict[tuple[str, int], nn.Module] = {}
    with torch.no_grad():
        for edit in edits:
            tensor = tensors[edit.tensor]
            if before is not None and edit.tensor not in before:
                before[edit.tensor] = tensor.clone()
            if isinstance(edit, Draw):
                path, _, name = edit.tensor.rpartition(".")
                if (path, edit.seed) not in layers:
                    layers[path, edit.seed] = redraw(model.get_submodule(path), edit.seed)
                tensor.copy_(getattr(layers[path, edit.seed], name))
            else:
                for rows in _independent(edit, tensor):
                    rows.copy_(_edited(edit, rows))
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NumericsError(edit.tensor, f"is not finite in {tensor.dtype} after the edit")


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields where `apply_edits` keeps tensors as they were before they are rewritten."""
    before: dict[str, Tensor] = {}
    try:
        yield before
    except BaseException:
        put_back(before, model)
        raise


def put_back(before: Mapping[str, Tensor], model: nn.Module) -> None:
    """Undoes edits, by what `apply_edits` kept."""
    tensors = named_tensors(model)
    with torch.no_grad():
        for key in reversed(list(before)):  # a tensor that has two keys ends as it was before the first
            tensors[key].copy_(before[key])


def with_aliases(edits: Iterable[Edit], model: nn.Module) -> tuple[Edit, ...]:
    """The edits with all the names that `model` has for their tensors."""
    tensors = named_tensors(model)

    def aliases(key: str) -> tuple[str, ...]:
        return tuple(other for other, tensor in tensors.items() if tensor is tensors.get(key) and other != key)

    return tuple(replace(edit, aliases=aliases(edit.tensor)) for edit in edits)


def _independent(edit: Edit, tensor: Tensor) -> Sequence[Tensor]:
    """A tensor in parts of some megabytes, if the edit does the same to each row; else as one."""
    alike = isinstance(edit, Scale) or (isinstance(edit, ScaleInputs) and edit.axis == 1 and edit.groups == 1)
    if not alike or not tensor.numel() or not tensor.ndim:
        return (tensor,)
    return torch.split(tensor, max(1, _PART * len(tensor) // tensor.numel()))


def _edited(edit: Edit, tensor: Tensor) -> Tensor:
    """The tensor after an edit, float64 on the CPU."""
    value = tensor.cpu().double()
    match edit:
        case Set():
            return torch.tensor(edit.values, dtype=torch.float64).view(tensor.shape)
        case Add():
            return value + torch.tensor(edit.values, dtype=torch.float64)
        case Scale():
            return value * edit.factor
        case ScaleInputs():
            rest = _inputs(edit, tensor)
            ranges = [(0, edit.start, 1.0), (edit.start, edit.stop, edit.factor), (edit.stop, rest, 1.0)]
            geometry = Geometry(axis=edit.axis, groups=edit.groups, transposed=False)
            return scale_inputs(value, per_channel(ranges), geometry)
    raise AssertionError(edit)


def _inputs(edit: ScaleInputs, weight: Tensor) -> int:
    """How many input channels a weight has."""
    if edit.axis == 0:  # depthwise: each group reads one; else transposed
        return edit.groups if edit.groups > 1 else weight.shape[0]
    return weight.shape[1] * edit.groups


def demand_weight(site: Site, tensors: Mapping[str, Tensor]) -> Tensor:
    """The fusion weight of a planned site; a SiteError if it is not among `tensors`, or of another shape."""
    weight = tensors.get(site.weight)
    if weight is None:
        raise SiteError(site.weight, "is in the plan but not in this model", remedy="use the plan's own model")
    inputs = site.branches[-1].stop
    if tuple(weight.shape[2:]) != site.kernel or not Geometry.of(site).fits(weight, inputs):
        raise SiteError(
            site.weight,
            "has other channels or another kernel than in the plan",
            got=list(weight.shape),
            expected=f"{inputs} input channels, kernel {list(site.kernel)}",
            remedy="use the plan's own model",
        )
    return weight


def _demand_fit(edit: Edit, tensors: Mapping[str, Tensor]) -> None:
    tensor = tensors.get(edit.tensor)
    if tensor is None:
        what = "is changed by the plan but is not in this model"
        raise SiteError(edit.tensor, what, remedy="use the plan's own model")
    expected = tensor.numel()
    if isinstance(edit, Add | Set) and len(edit.values) != expected:
        raise SiteError(edit.tensor, "has another size than in the plan", got=expected, expected=len(edit.values))
    if isinstance(edit, ScaleInputs):
        channels = _inputs(edit, tensor) if tensor.ndim > 1 and len(tensor) % edit.groups == 0 else 0
        if edit.stop > channels:
            raise SiteError(
                edit.tensor, "has fewer channels than in the plan", got=channels, expected=f"{edit.stop} or more"
            )
