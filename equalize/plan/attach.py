"""Training through scale equalization: the optimizer sees V, the layer computes with W = V A.

A multiplies input channels by tau/sigma of their branch: V_b = W_b sigma_b/tau are the weights that explicit equalizers
in front of the layer would leave. `attach` registers a parametrization from V to W, so that gradients, momentum and
weight decay act on V at the cost of one product over the weights a step. State dicts hold plain W all the while, see
`equalize.plan.plain_state`. `fold` leaves plain W.
"""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equalize.errors import SiteError
from equalize.plan.apply import demand_weight
from equalize.plan.equation import DiagonalMap, Geometry, branch_vectors
from equalize.plan.parametrization import (
    FoldedWeight,
    ShiftedBias,
    attached,
    parametrizations,
    plain_tensors,
    take_written,
)
from equalize.plan.plain_state import register_plain_state, remove_plain_state
from equalize.plan.plan import Plan, PlannedSite, target_scale


def attach(plan: Plan, model: nn.Module) -> None:
    """Parametrizes each site's weight W by its equalized V, of the same shape.

    The parameters stay the objects that they are, so that an optimizer may be built before or afterwards.

    A layer with a bias also gets its shift: a' = a + sum_b mu_b sum W_b.

    Raises:
        SiteError: a layer is not in the model, of another shape, parametrized already or without values, its weight or
            bias is not its own, or the plan is an old one that kept norms; nothing is changed then.
    """
    demand_trainable(plan)
    _demand_fit(plan, model)
    with torch.inference_mode(False):  # what is kept for V -> W takes part in training
        for site in plan.equalized:
            _attach(plan, site, model)


def _attach(plan: Plan, site: PlannedSite, model: nn.Module) -> None:
    path, _, name = site.weight.rpartition(".")
    layer = model.get_submodule(path)
    weight = layer.get_parameter(name)
    folded = FoldedWeight(layer, site.weight, weight, _input_map(plan, site, weight))
    _parametrize(layer, name, folded)
    if site.shift == "bias" and site.bias is not None:
        bias = site.bias.rpartition(".")[2]
        mean_I, _ = branch_vectors(site, plan.input_scale(site))
        shifted = ShiftedBias(layer, name, layer.get_parameter(bias), mean_I.to(weight), Geometry.of(site))
        _parametrize(layer, bias, shifted)
    register_plain_state(layer, fold)


def _demand_fit(plan: Plan, model: nn.Module) -> None:
    tensors = dict(nn.Module.named_parameters(model, remove_duplicate=False))
    layers = dict(nn.Module.named_modules(model, remove_duplicate=False))
    places = Counter(id(each) for layer in nn.Module.modules(model) for each in layer._parameters.values())
    for site in plan.equalized:
        path = site.weight.rpartition(".")[0]
        if path in layers and parametrize.is_parametrized(layers[path]):
            raise SiteError(site.weight, "is already parametrized", remedy="call fold first")
        weight = demand_weight(site, tensors)
        if weight.is_meta:
            raise SiteError(site.weight, "is on the meta device, without values", remedy="load the weights first")
        bias = site.bias if site.shift == "bias" else None
        if bias is not None and (bias not in tensors or bias.rpartition(".")[0] != path):
            what = f"is in the plan but not a parameter of the module of {site.weight}"
            raise SiteError(bias, what, remedy="use the plan's own model, or train without attach")
        for key in (site.weight, bias):
            if key is not None and places[id(tensors[key])] > 1:
                what = "is a parameter of several layers, of which one alone would be equalized"
                raise SiteError(key, what, remedy="give each layer its own, or train without attach")


def _parametrize(layer: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Registers a parametrization in front of the parameter that there is.

    torch would give it other storage, by `set_`, and then gradients no longer reach DistributedDataParallel's hooks.
    """
    parameter = layer.get_parameter(name)
    stand_in = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    setattr(layer, name, stand_in)
    parametrize.register_parametrization(layer, name, parametrization)
    with torch.no_grad():
        parameter.copy_(stand_in)
    parametrizations(layer)[name].original = parameter


def demand_trainable(plan: Plan) -> None:
    """Refuses, by a SiteError, a plan of an earlier version that kept the norms of weights."""
    if plan.facts.get("keep_norm"):
        what = "stands in the plan, and weights kept at their norm cannot be trained through"
        raise SiteError("keep_norm", what, remedy="calibrate the original again, with --scale, or --train-as folded")


def _input_map(plan: Plan, site: PlannedSite, weight: Tensor) -> DiagonalMap:
    """From V to the weight W of a site whose branches have the scales that the plan left them.

    It aims at what the site's scale was when it was measured: after `migrate`, which brings all branches to a scale of
    its own, the factor is one number for all of them, and the layer still steps as far as it did before.
    """
    _, std_I = branch_vectors(site, plan.input_scale(site))
    return DiagonalMap(factor_I=(target_scale(site, plan.scale) / std_I).to(weight), geometry=Geometry.of(site))


def fold(model: nn.Module) -> None:
    """Undoes `attach`: plain weights with the same function, under the keys and in the order they had.

    Tensors that training did not change keep every bit.
    """
    for layer in nn.Module.modules(model):
        ours = attached(layer)
        if not ours:
            continue
        take_written(layer)
        values = plain_tensors(layer)
        order = next((each.order for each, _ in ours.values() if isinstance(each, FoldedWeight)), [])
        remove_plain_state(layer)
        kind = type(layer)  # torch takes properties off it below: a copy of the network must not share it
        layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        for name, value in values.items():
            parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
            layer.get_parameter(name).data.copy_(value)
        for name in order:
            if name in layer._parameters:
                layer._parameters[name] = layer._parameters.pop(name)
