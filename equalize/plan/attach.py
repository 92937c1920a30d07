"""Training through scale equalization: the optimizer sees V, the layer computes with W = V/sigma.

V = sigma_b W_b are the weights that explicit equalizers in front of the layer would leave; `attach` registers a
parametrization from V to W, so that gradients, momentum and weight decay act on V at the cost of one product over the
weights a step. `fold` leaves plain W.
"""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equalize.errors import SiteError
from equalize.plan.apply import demand_weight
from equalize.plan.equation import Geometry, branch_vectors, fold_weight, scale_inputs, shift_of
from equalize.plan.plan import Plan


def attach(plan: Plan, model: nn.Module) -> None:
    """Parametrizes each site's weight W by its equalized V, of the same shape. Build the optimizer afterwards.

    A layer with a bias also gets its shift: a' = a + sum_b mu_b sum W_b.

    Raises:
        SiteError: a layer is not in the model, of another shape or parametrized already; nothing is changed then.
    """
    tensors = dict(nn.Module.named_parameters(model, remove_duplicate=False))
    attached = {path for path, layer in nn.Module.named_modules(model) if parametrize.is_parametrized(layer)}
    for site in plan.equalized:
        if site.weight.rpartition(".")[0] in attached:
            raise SiteError(site.weight, "is already parametrized", remedy="call fold first")
        demand_weight(site, tensors)
    for site in plan.equalized:
        path, _, name = site.weight.rpartition(".")
        layer = model.get_submodule(path)
        weight = layer.get_parameter(name)
        mean_I, std_I = branch_vectors(site, plan.input_scale(site))
        geometry = Geometry.of(site)
        gain = 1.0
        if plan.keep_norm:  # V with the norm that W has
            gain = float(weight.detach().norm() / scale_inputs(weight.detach(), std_I, geometry).norm())
        folded = _FoldedWeight(weight, mean_I, std_I * gain, geometry, list(layer._parameters))
        parametrize.register_parametrization(layer, name, folded)
        if site.shift == "bias" and site.bias is not None:
            bias = site.bias.rpartition(".")[2]
            parametrize.register_parametrization(layer, bias, _ShiftedBias(layer, name, layer.get_parameter(bias)))


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

    def __init__(self, weight: Tensor, mean_I: Tensor, std_I: Tensor, geometry: Geometry, order: list[str]) -> None:
        super().__init__()
        self.start = weight.detach().clone()  # a plain attribute: no part of the state dict
        self.mean_I = mean_I.to(weight)
        self.std_I = std_I.to(weight)
        self.geometry = geometry
        self.order = order

    def forward(self, v: Tensor) -> Tensor:
        return fold_weight(v, self.std_I, self.geometry)

    def shift(self, v: Tensor) -> Tensor:
        """s (O,)."""
        return shift_of(v, self.mean_I, self.std_I, self.geometry)

    def right_inverse(self, w: Tensor) -> Tensor:
        return scale_inputs(w, self.std_I, self.geometry)

    def exact(self, v: Tensor) -> Tensor:
        """W, (O, I/G, *K), without the rounding of W -> V -> W."""
        start = self.start.to(v)
        return self.forward(v.detach()).where(v.detach() != self.right_inverse(start), start)


class _ShiftedBias(nn.Module):
    """a' -> a = a' - s(V)."""

    def __init__(self, layer: nn.Module, weight: str, bias: Tensor) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: the layer is the parent, no submodule
        self.weight = weight
        self.start = bias.detach().clone()

    def _folded(self) -> tuple[_FoldedWeight, Tensor]:
        """The parametrization of the weight beside this bias, and the V of this moment."""
        parametrization = _parametrizations(self._layer[0])[self.weight]
        folded = parametrization[0]
        assert isinstance(folded, _FoldedWeight)
        return folded, parametrization.original

    def forward(self, shifted: Tensor) -> Tensor:
        folded, v = self._folded()
        return shifted - folded.shift(v)

    def right_inverse(self, bias: Tensor) -> Tensor:
        folded, v = self._folded()
        return bias + folded.shift(v.detach())

    def exact(self, shifted: Tensor) -> Tensor:
        """The bias (O,), with its original bits where neither it nor V has changed."""
        folded, v = self._folded()
        start = self.start.to(shifted)
        v_start = folded.right_inverse(folded.start.to(v))
        moved = shifted.detach() != start + folded.shift(v_start)
        return self.forward(shifted).detach().where(moved | (v.detach() != v_start).any(), start)
