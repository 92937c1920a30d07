"""Training through scale equalization: the optimizer sees V, the layer computes with W = V A.

A multiplies input channels by tau/sigma of their branch: V_b = W_b sigma_b/tau are the weights that explicit equalizers
in front of the layer would leave. `attach` registers a parametrization from V to W, so that gradients, momentum and
weight decay act on V at the cost of one product over the weights a step. `fold` leaves plain W.
"""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equalize.errors import SiteError
from equalize.plan.apply import demand_weight
from equalize.plan.equation import DiagonalMap, Geometry, InputMap, branch_vectors, shift_of
from equalize.plan.plan import Plan, PlannedSite, target_scale


def attach(plan: Plan, model: nn.Module) -> None:
    """Parametrizes each site's weight W by its equalized V, of the same shape. Build the optimizer afterwards.

    A layer with a bias also gets its shift: a' = a + sum_b mu_b sum W_b.

    Raises:
        SiteError: a layer is not in the model, of another shape or parametrized already, or the plan is an old one
            that kept norms; nothing is changed then.
    """
    demand_trainable(plan)
    tensors = dict(nn.Module.named_parameters(model, remove_duplicate=False))
    attached = {path for path, layer in nn.Module.named_modules(model) if parametrize.is_parametrized(layer)}
    for site in plan.sites:
        if site.weight.rpartition(".")[0] in attached:
            raise SiteError(site.weight, "is already parametrized", remedy="call fold first")
        demand_weight(site, tensors)
    for site in plan.sites:
        path, _, name = site.weight.rpartition(".")
        layer = model.get_submodule(path)
        weight = layer.get_parameter(name)
        folded = _FoldedWeight(weight, _input_map(plan, site, weight), list(layer._parameters))
        parametrize.register_parametrization(layer, name, folded)
        if site.shift == "bias" and site.bias is not None:
            bias = site.bias.rpartition(".")[2]
            mean_I, _ = branch_vectors(site, plan.input_scale(site))
            shifted = _ShiftedBias(layer, name, layer.get_parameter(bias), mean_I.to(weight), Geometry.of(site))
            parametrize.register_parametrization(layer, bias, shifted)


def demand_trainable(plan: Plan) -> None:
    """Refuses, by a SiteError, a plan of an earlier version that kept the norms of weights."""
    if plan.facts.get("keep_norm"):
        what = "stands in the plan, and weights kept at their norm cannot be trained through"
        raise SiteError("keep_norm", what, remedy="calibrate the original again, with --scale, or --train-as folded")


def _input_map(plan: Plan, site: PlannedSite, weight: Tensor) -> InputMap:
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
        if "parametrizations" not in layer._modules:  # a compiled module has those of the one that it wraps
            continue
        lists = _parametrizations(layer)
        ours = {name: each[0] for name, each in lists.items() if isinstance(each[0], _FoldedWeight | _ShiftedBias)}
        values = {name: each.exact(lists[name].original) for name, each in ours.items()}
        order = next((each.order for each in ours.values() if isinstance(each, _FoldedWeight)), [])
        kind = type(layer)  # torch takes properties off it below: a copy of the network must not share it
        layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        for name, value in values.items():
            parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
            layer.get_parameter(name).data.copy_(value)
        for name in order:
            if name in layer._parameters:
                layer._parameters[name] = layer._parameters.pop(name)


def _parametrizations(layer: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    lists = layer.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return {name: each for name, each in lists.items() if isinstance(each, parametrize.ParametrizationList)}


class _FoldedWeight(nn.Module):
    """V -> W, with the original bits of W where V has not changed."""

    def __init__(self, weight: Tensor, input_map: InputMap, order: list[str]) -> None:
        super().__init__()
        self.start = weight.detach().clone()  # a plain attribute: no part of the state dict
        self.input_map = input_map
        self.order = order

    def forward(self, v: Tensor) -> Tensor:
        return self.input_map.fold(v)

    def right_inverse(self, w: Tensor) -> Tensor:
        return self.input_map.unfold(w)

    def exact(self, v: Tensor) -> Tensor:
        """W, (O, I/G, *K), without the rounding of W -> V -> W."""
        start = self.start.to(v)
        return self.forward(v.detach()).where(v.detach() != self.right_inverse(start), start)


class _ShiftedBias(nn.Module):
    """a' -> a = a' - s(V)."""

    def __init__(self, layer: nn.Module, weight: str, bias: Tensor, mean_I: Tensor, geometry: Geometry) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: the layer is the parent, no submodule
        self.weight = weight
        self.start = bias.detach().clone()
        self.mean_I = mean_I
        self.geometry = geometry

    def _shift(self, w: Tensor) -> Tensor:
        """s (O,)."""
        return shift_of(w, self.mean_I, self.geometry)

    def _folded(self) -> tuple[_FoldedWeight, Tensor]:
        """The parametrization of the weight beside this bias, and the V of this moment."""
        parametrization = _parametrizations(self._layer[0])[self.weight]
        folded = parametrization[0]
        assert isinstance(folded, _FoldedWeight)
        return folded, parametrization.original

    def forward(self, shifted: Tensor) -> Tensor:
        folded, v = self._folded()
        return shifted - self._shift(folded(v))

    def right_inverse(self, bias: Tensor) -> Tensor:
        folded, v = self._folded()
        return bias + self._shift(folded(v.detach()))

    def exact(self, shifted: Tensor) -> Tensor:
        """The bias (O,), with its original bits where neither it nor V has changed."""
        folded, v = self._folded()
        start = self.start.to(shifted)
        v_start = folded.right_inverse(folded.start.to(v))
        moved = shifted.detach() != start + self._shift(folded(v_start))
        return self.forward(shifted).detach().where(moved | (v.detach() != v_start).any(), start)
