"""Training through scale equalization: the optimiser sees V, the layer computes with W = V/sigma.

V = sigma_b W_b are the weights that explicit equalizers in front of the layer would leave; `attach` registers a
parametrization from V to W, so that gradients, momentum and weight decay act on V at the cost of one product over the
weights a step. `fold` leaves plain W.
"""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equalize.equation import Geometry, fold_equalizer, scale_inputs
from equalize.errors import SiteError
from equalize.plan import Plan
from equalize.strategies import branch_vectors

__all__ = ["attach", "fold"]


def attach(plan: Plan, model: nn.Module) -> None:
    """Shows the optimiser the equalized weights of every site. Build the optimiser afterwards.

    A layer with a bias and no normalisation behind it also gets its shift: a' = a + sum_b mu_b sum W_b.

    Raises:
        SiteError: if a layer is not in the model, or is already parametrized.
    """
    for site in plan.sites:
        path, _, name = site.weight.rpartition(".")
        try:
            layer = model.get_submodule(path)
            weight = layer.get_parameter(name)
        except AttributeError as error:
            raise SiteError(site.weight, "is in the plan but not in this model", remedy="use the plan's own model") from error
        if parametrize.is_parametrized(layer, name):
            raise SiteError(site.weight, "is already parametrized", remedy="call fold first")
        mean_I, std_I = branch_vectors(site, plan.input_scale(site))
        geometry = Geometry.of(site)
        gain = 1.0
        if plan.keep_norm:  # V with the norm that W has
            gain = float(weight.detach().norm() / scale_inputs(weight.detach(), std_I, geometry).norm())
        order = list(layer._parameters)
        folded = _FoldedWeight(weight, mean_I * gain, std_I * gain, geometry, order)
        parametrize.register_parametrization(layer, name, folded)
        if site.shift == "bias" and site.norm is None and site.bias is not None:
            bias = site.bias.rpartition(".")[2]
            parametrize.register_parametrization(layer, bias, _ShiftedBias(layer, name, layer.get_parameter(bias)))


def fold(model: nn.Module) -> None:
    """Undoes `attach`: plain weights with the same function, under the keys and in the order they had.

    What training did not change comes back to the last bit.
    """
    for layer in model.modules():
        if not parametrize.is_parametrized(layer):
            continue
        lists = layer.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        ours = {name: each[0] for name, each in lists.items() if isinstance(each[0], _FoldedWeight | _ShiftedBias)}
        values = {name: each.exact(lists[name].original) for name, each in ours.items()}
        order = next((each.order for each in ours.values() if isinstance(each, _FoldedWeight)), [])
        for name, value in values.items():
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
            layer.get_parameter(name).data.copy_(value)
        for name in order:
            if name in layer._parameters:
                layer._parameters[name] = layer._parameters.pop(name)


class _FoldedWeight(nn.Module):
    """V -> W, with W as it was where V has not moved."""

    def __init__(self, weight: Tensor, mean_I: Tensor, std_I: Tensor, geometry: Geometry, order: list[str]) -> None:
        super().__init__()
        self.start = weight.detach().clone()  # a plain attribute: no part of the state dict
        self.mean_I = mean_I.to(weight)
        self.std_I = std_I.to(weight)
        self.geometry = geometry
        self.order = order

    def forward(self, v: Tensor) -> Tensor:
        return self.fold(v)[0]

    def fold(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """W and the shift s for weights v."""
        return fold_equalizer(v, self.mean_I.to(v), self.std_I.to(v), self.geometry)

    def right_inverse(self, w: Tensor) -> Tensor:
        return scale_inputs(w, self.std_I, self.geometry)

    def exact(self, v: Tensor) -> Tensor:
        """W, without the rounding of a way there and back."""
        start = self.start.to(v)
        return self.fold(v.detach())[0].where(v.detach() != self.right_inverse(start), start)


class _ShiftedBias(nn.Module):
    """a' -> a = a' - s(V)."""

    def __init__(self, layer: nn.Module, weight: str, bias: Tensor) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: the layer is the parent, no submodule
        self.weight = weight
        self.start = bias.detach().clone()

    def shift(self) -> Tensor:
        """s (O,) for the V of this moment."""
        lists = self._layer[0].parametrizations
        assert isinstance(lists, nn.ModuleDict)
        folded = lists[self.weight][0]
        assert isinstance(folded, _FoldedWeight)
        return folded.fold(lists[self.weight].original)[1]

    def forward(self, shifted: Tensor) -> Tensor:
        return shifted - self.shift()

    def right_inverse(self, bias: Tensor) -> Tensor:
        return bias + self.shift().detach()

    def exact(self, shifted: Tensor) -> Tensor:
        """The bias, without the rounding of a way there and back."""
        folded = self.forward(shifted).detach()
        start = self.start.to(shifted)
        lists = self._layer[0].parametrizations
        assert isinstance(lists, nn.ModuleDict)
        weight = lists[self.weight]
        v_start = weight[0].right_inverse(weight[0].start.to(weight.original))
        if not (weight.original == v_start).all():
            return folded
        return folded.where(shifted.detach() != start + weight[0].fold(v_start)[1], start)
