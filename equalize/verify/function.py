"""The proof: what was written is the original with the plan's edits, and does what the plan says.

Two questions. Tensors: are the keys on disk the same, are all tensors but the listed ones the same bits, and the listed
ones what the plan makes of the original? Function: does each fusion layer, on real features, do what explicit
equalizers in front of the original layer would (`rescale`, `reinit`), or what the original did (`migrate`, `preserve`)?
The reference is computed from the original's weights and the equalizer's definition, not from the folded ones.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equalize.errors import NumericsError
from equalize.moments.measure import measure
from equalize.moments.watch import Batch, Call, inputs_of, run, undisturbed
from equalize.plan.apply import apply, redraw
from equalize.plan.plan import Plan
from equalize.plan.strategies import CHANGES_FUNCTION, branch_vectors
from equalize.sites.sites import Site

__all__ = ["Check", "check_function", "check_tensors"]

# Of the range of what is compared, where weights are stored in float32; other dtypes get as many times their epsilon.
_TOLERANCE = 1e-5
_CROP = 32  # pixels a spatial axis: a linear layer is the same function everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Largest deviations found.

    Attributes:
        max_abs_change: of the logits from the original's, absolute.
        interior: of fusion layers' outputs from what they should be, relative to their range, where no padding reaches.
        border: the same where padding reaches; explicit equalizers would pad with the mean.
    """

    max_abs_change: float
    interior: float
    border: float

    def to_json(self) -> dict[str, float]:
        """What stands under "check" in a plan."""
        return asdict(self)


def check_tensors(original: Mapping[str, Tensor], written: Mapping[str, Tensor], listed: Iterable[str]) -> None:
    """Demands the same keys, dtypes and shapes, and the same bits in every tensor that is not listed.

    Args:
        original, written: tensors by key.
        listed: keys that may differ, or be new.

    Raises:
        NumericsError: names the first three offenders and their number.
    """
    free = set(listed)
    _demand("are missing", sorted(set(original) - set(written)))
    _demand("were added", sorted(set(written) - set(original) - free))
    both = [key for key in original if key in written]
    _demand("have another dtype or shape", [key for key in both if not _same_layout(original[key], written[key])])
    fixed = [key for key in both if key not in free]
    _demand(
        "changed but are not in the plan",
        [k for k in fixed if not torch.equal(_bytes(original[k]), _bytes(written[k]))],
    )


def _demand(what: str, keys: Sequence[str]) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise NumericsError(
            ", ".join(keys[:3]) + more, f"{what} in what was written", remedy="calibrate again from the original"
        )


def _same_layout(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def check_function(
    original: nn.Module,
    written: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    logits: Callable[[Any], Tensor],
    *,
    stored: torch.dtype = torch.float32,
) -> Check:
    """Compares two models, in float32 on one device, over a few images.

    Args:
        original: as it was before the plan; afterwards the plan is applied to it.
        written: as its library's own loader gives it.
        plan: what should lie between the two.
        batches: inputs of the network.
        logits: picks (N, classes, h, w) from what a model returns.
        stored: the dtype that the weights are stored in; the coarsest, if there are several.

    Raises:
        NumericsError: a deviation is larger than rounding explains.
    """
    resolution = torch.finfo(stored)
    tolerance = _TOLERANCE * resolution.eps / torch.finfo(torch.float32).eps
    check = _compare(original, written, plan, batches, logits, tolerance)
    apply(plan, original)
    expected = original.state_dict()
    relative, absolute = 4 * resolution.eps, resolution.smallest_normal * resolution.eps
    for key, tensor in written.state_dict().items():
        if key in plan.changed and not torch.allclose(tensor, expected[key].to(tensor), relative, absolute):
            raise NumericsError(key, "is not what the plan makes of the original", remedy="apply the plan again")
    return check


def _compare(
    original: nn.Module,
    written: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    logits: Callable[[Any], Tensor],
    tolerance: float,
) -> Check:
    keeps_function = not any(site.strategy in CHANGES_FUNCTION for site in plan.sites)
    with undisturbed(original):
        before = [logits(original(*inputs_of(batch))) for batch in batches]
    comparisons = {site.weight: _Comparison(original, site, plan) for site in plan.sites}
    with undisturbed(written):
        outputs = run(written, {key: each.add for key, each in comparisons.items()}, batches, stop=False)
        change = max(
            (float((logits(output) - reference).abs().max()), float(reference.max() - reference.min()))
            for output, reference in zip(outputs, before, strict=True)
        )
    check = Check(
        max_abs_change=change[0],
        interior=max((each.interior for each in comparisons.values()), default=0.0),
        border=max((each.border for each in comparisons.values()), default=0.0),
    )
    if keeps_function:
        allowed = tolerance * change[1] if plan.changed else 0.0
        _demand_close("logits", check.max_abs_change, allowed)
        _check_scales(original, written, plan, batches, tolerance)
    for each in comparisons.values():
        _demand_close(each.site.layer, each.interior, tolerance)
        if each.site.exact_border or each.site.strategy not in CHANGES_FUNCTION:
            _demand_close(f"{each.site.layer} on the border", each.border, tolerance)
    return check


def _demand_close(where: str, got: float, allowed: float) -> None:
    if not got <= allowed:
        raise NumericsError(
            where,
            "does not do what the plan says",
            got=f"a deviation of {got:.3g}",
            expected=f"at most {allowed:.3g}",
            remedy="is it the model that was equalized? if so, please report this with its configuration",
        )


def _check_scales(
    original: nn.Module, written: nn.Module, plan: Plan, batches: Sequence[Batch], tolerance: float
) -> None:
    """`migrate`: every branch has the scale that the plan gives it."""
    sites = [site for site in plan.sites if site.strategy == "migrate"]
    # Of no known length, so that the networks are run as they stand and not cut.
    before, after = measure(original, sites, iter(batches)), measure(written, sites, iter(batches))
    for site in sites:
        for scale, old, new in zip(plan.input_scale(site), before[site.layer], after[site.layer], strict=True):
            if old.std > 0:
                _demand_close(f"sigma of {site.layer}", abs(new.std * scale / old.std - 1), 10 * tolerance)


class _Comparison:
    """One site's output against its reference, over all calls."""

    def __init__(self, original: nn.Module, site: Site, plan: Plan) -> None:
        self.site = site
        self.interior = 0.0
        self.border = 0.0
        source = original.get_submodule(site.weight.rpartition(".")[0])
        draw = next((edit for edit in plan.edits if edit.action == "draw" and edit.tensor == site.weight), None)
        if draw is not None:
            source = redraw(source, draw.seed or 0)
        self.weight = getattr(source, site.weight.rpartition(".")[2]).detach()
        self.bias = getattr(source, site.bias.rpartition(".")[2]).detach().double() if site.bias else None
        scales = [edit for edit in plan.edits if edit.tensor == site.weight and edit.factor is not None]
        # The layer may itself produce a branch that migrated.
        self.gain = math.prod(edit.factor or 1.0 for edit in scales if edit.start is None)
        self.mean_I, self.std_I = branch_vectors(site, plan.input_scale(site))
        self.scale_I = branch_vectors(site)[1] / self.std_I
        self.norm = 1.0
        if site.strategy in CHANGES_FUNCTION and plan.keep_norm:  # V with another norm: what was divided by, tells
            first = next(edit.factor or 1.0 for edit in scales if edit.start == 0)
            self.norm = first * (site.branches[0].std or 1.0)

    def add(self, call: Call) -> None:
        """Compares the layer as written with its reference on one call's input."""
        u = call.data[(slice(0, 1), slice(None), *([slice(0, _CROP)] * len(self.site.kernel)))]
        got = call(input=u).double()
        if self.site.strategy in CHANGES_FUNCTION:
            weight = self.weight.double() * self.norm
            x = u.double() - self._along(self.mean_I, u) if self.site.shift else u.double()
            reference = call(input=x / self._along(self.std_I, u), weight=weight, bias=self.bias)
        else:  # in the layer's own precision, so that nothing changed means no deviation
            scale = self._along(self.scale_I, u).to(u)
            bias = None if self.bias is None else self.bias.to(u)
            reference = call(input=u * scale, weight=self.weight.to(u.dtype), bias=bias).double()
        reference = reference * self.gain
        inside = self._inside(call, u)
        size = max(float(reference.max() - reference.min()), float(reference.abs().max()))
        if self.site.strategy in CHANGES_FUNCTION and self.site.shift == "running_mean":
            constant = self._along(self.mean_I / self.std_I, u).expand_as(u)
            response = call(input=constant, weight=weight, bias=None)
            if not inside.any():
                return
            offset = response.movedim(1, -1)[:, inside][0, 0] * self.gain  # what the BatchNorm behind takes away
            got = got - offset.view(1, -1, *(1,) * (got.ndim - 2))
            size = max(size, float(offset.abs().max()))
        deviation = (got - reference).abs() / max(size, torch.finfo(torch.float64).tiny)
        deviation = deviation if self.site.op == "linear" else deviation.movedim(1, -1)
        if inside.any():
            self.interior = max(self.interior, float(deviation[:, inside].max()))
        if not inside.all():
            self.border = max(self.border, float(deviation[:, ~inside].max()))

    def _along(self, vector_I: Tensor, u: Tensor) -> Tensor:
        """A per-channel vector, shaped to multiply the layer's input."""
        if self.site.op == "linear":
            return vector_I
        return vector_I.view(1, -1, *(1,) * (u.ndim - 2))

    def _inside(self, call: Call, u: Tensor) -> Tensor:
        """Where every tap of the kernel reads a real value: a mask over the output's places."""
        if self.site.op == "linear":
            return torch.ones(u.shape[1:-1], dtype=torch.bool)
        few = self.weight[:, :1] if "transpose" in self.site.op else self.weight[: self.site.groups]
        taps = call(input=torch.ones_like(u), weight=torch.ones_like(few, dtype=u.dtype), bias=None)[0, 0]
        if self.site.exact_border:
            return torch.ones_like(taps, dtype=torch.bool)
        per_output = self.weight[:, 0].numel() // self.weight.shape[0] * u.shape[1] // self.site.groups
        inside: Tensor = taps == per_output
        return inside
