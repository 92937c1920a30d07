"""Verifies that a written model computes what the plan says.

Does each fusion layer, on real features, do what explicit equalizers in front of the original layer would (`rescale`,
`reinit`), or what the original did (`migrate`, `preserve`)? The reference is computed from the original's weights and
the equalizer's definition, not from the folded ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from equalize.errors import NumericsError
from equalize.eval_mode import eval_mode
from equalize.moments.measure import measure
from equalize.moments.watch import Batch, Call, inputs_of, observe
from equalize.plan.draw import redraw
from equalize.plan.edits import Draw, Scale
from equalize.plan.equation import branch_vectors
from equalize.plan.plan import Plan, PlannedSite

# Of the range of what is compared, where weights are stored in float32; other dtypes get as many times their epsilon.
_TOLERANCE = 1e-5
_COARSE = (torch.bfloat16, torch.float16)
_CROP = 32  # pixels a spatial axis: a linear layer is the same function everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Largest deviations found.

    Attributes:
        max_abs_change: of the logits from the original's, absolute.
        interior: of fusion layers' outputs from what they should be, relative to their range, where no padding reaches.
        border: the same where padding reaches; explicit equalizers would pad with the mean.
        logit_range: largest less smallest logit of the original, which `max_abs_change` is to be held against.
    """

    max_abs_change: float
    interior: float
    border: float
    logit_range: float = 0.0

    def to_json(self) -> dict[str, float]:
        """What stands under "check" in a plan."""
        return {"max_abs_change": self.max_abs_change, "interior": self.interior, "border": self.border}


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
        original, written: as it was before the plan, and as its library's own loader gives it.
        batches: inputs of the network.
        logits: picks (N, classes, h, w) from what a model returns.
        stored: the dtype that the weights are stored in; the coarsest, if there are several.

    Raises:
        NumericsError: a deviation is larger than rounding explains.
    """
    tolerance = _TOLERANCE * torch.finfo(stored).eps / torch.finfo(torch.float32).eps
    keeps_function = not any(site.changes_function for site in plan.sites)
    with eval_mode(original):
        before = [logits(original(*inputs_of(batch))) for batch in batches]
    comparisons = {site.weight: _Comparison(original, site, plan) for site in plan.sites}
    with eval_mode(written):
        passes = observe(written, {key: each.add for key, each in comparisons.items()}, batches, stop=False)
        change, extent = 0.0, 0.0
        for seen, reference in zip(passes, before, strict=True):
            change = _largest(change, (logits(seen.output) - reference).abs())
            extent = _largest(extent, reference.max() - reference.min())
    check = Check(
        max_abs_change=change,
        interior=max((each.interior for each in comparisons.values()), default=0.0),
        border=max((each.border for each in comparisons.values()), default=0.0),
        logit_range=extent,
    )
    try:
        if keeps_function:
            _demand_close("logits", check.max_abs_change, tolerance * extent if plan.changed else 0.0)
            _check_scales(original, written, plan, batches, tolerance)
        for each in comparisons.values():
            each.demand_close(tolerance)
    except NumericsError as error:
        raise _with_cause(error, _coarse_dtypes(original, batches[0])) from error
    return check


def _with_cause(error: NumericsError, coarse: str) -> NumericsError:
    if not coarse:
        return error
    what = f"cannot be proven, for the network's own forward computes in {coarse} (torch.autocast or a cast)"
    remedy = "take that out of it, or use --strategy preserve, which changes no weight"
    return NumericsError(error.where, what, got=error.got, expected=error.expected, remedy=remedy)


def _coarse_dtypes(model: nn.Module, batch: Batch) -> str:
    """The dtypes coarser than float32 that the forward of a float32 network computes in; empty if there are none."""
    found: set[torch.dtype] = set()

    def look(module: nn.Module, inputs: Any) -> None:
        given = [each for each in inputs if isinstance(each, Tensor)]
        devices = {each.device.type for each in given}
        found.update(each.dtype for each in given)
        found.update(torch.get_autocast_dtype(each) for each in devices if torch.is_autocast_enabled(each))

    handle = register_module_forward_pre_hook(look)
    try:
        with eval_mode(model):
            model(*inputs_of(batch))
    finally:
        handle.remove()
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in _COARSE if dtype in found)


def _largest(so_far: float, values: Tensor) -> float:
    """NaN if there is one, which `max` would lose."""
    return float(torch.maximum(torch.tensor(so_far, dtype=torch.float64), values.max().double().cpu()))


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

    def __init__(self, original: nn.Module, site: PlannedSite, plan: Plan) -> None:
        self.site = site
        self.interior = 0.0
        self.border = 0.0
        source = original.get_submodule(site.weight.rpartition(".")[0])
        draw = next((edit for edit in plan.edits if isinstance(edit, Draw) and edit.tensor == site.weight), None)
        if draw is not None:
            source = redraw(source, draw.seed)
        self.weight = getattr(source, site.weight.rpartition(".")[2]).detach()
        self.bias = getattr(source, site.bias.rpartition(".")[2]).detach().double() if site.bias else None
        # The layer may itself produce a branch that migrated.
        scales = [edit for edit in plan.edits if isinstance(edit, Scale) and edit.tensor == site.weight]
        self.gain = math.prod(edit.factor for edit in scales)
        self.mean_I, self.std_I = branch_vectors(site, plan.input_scale(site))
        self.scale_I = branch_vectors(site)[1] / self.std_I

    def add(self, call: Call) -> None:
        """Compares the layer as written with its reference on one call's input."""
        u = call.data[(slice(0, 1), slice(None), *([slice(0, _CROP)] * len(self.site.kernel)))]
        got = call(input=u).double()
        if self.site.changes_function:
            x = u.double() - self._along(self.mean_I, u) if self.site.shift else u.double()
            equalized = x * (self.site.tau / self._along(self.std_I, x))
            reference = call(input=equalized, weight=self.weight.double(), bias=self.bias)
        else:  # in the layer's own precision, so that nothing changed means no deviation
            scale = self._along(self.scale_I, u).to(u)
            bias = None if self.bias is None else self.bias.to(u)
            reference = call(input=u * scale, weight=self.weight.to(u.dtype), bias=bias).double()
        reference = reference * self.gain
        inside = self._inside(call, u)
        size = max(float(reference.max() - reference.min()), float(reference.abs().max()))
        deviation = (got - reference).abs() / max(size, torch.finfo(torch.float64).tiny)
        deviation = deviation if self.site.op == "linear" else deviation.movedim(1, -1)
        if inside.any():
            self.interior = _largest(self.interior, deviation[:, inside])
        if not inside.all():
            self.border = _largest(self.border, deviation[:, ~inside])

    def demand_close(self, tolerance: float) -> None:
        """Raises a NumericsError where a deviation is larger, on the border only if it is none by definition."""
        _demand_close(self.site.layer, self.interior, tolerance)
        if self.site.exact_border or not self.site.changes_function:
            _demand_close(f"{self.site.layer} on the border", self.border, tolerance)

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
