"""The parametrizations that `attach` registers on a fusion layer: V -> W, and a' -> a.

The tensors of a layer are called original (V, a') and plain (W, a), after torch's `parametrizations.*.original`.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equalize.errors import SiteError
from equalize.plan.equation import DiagonalMap, Geometry, shift_of

_LOGGER = logging.getLogger("equalize")


class FoldedWeight(nn.Module):
    """V -> W, with the original bits of W where V has not changed."""

    def __init__(self, layer: nn.Module, key: str, weight: Tensor, input_map: DiagonalMap) -> None:
        super().__init__()
        self.key = key
        self.frozen = not weight.requires_grad  # as it is known to be
        self._layer = (layer,)  # in a tuple: the layer is the parent, no submodule
        self.start = weight.detach().clone()  # a plain attribute: no part of the state dict
        self.input_map = input_map
        self.order = list(layer._parameters)
        self.shown: dict[str, tuple[Tensor, int]] = {}
        """The plain tensors that the last state dict holds, by name, and the versions that they had then."""

    def forward(self, v: Tensor) -> Tensor:
        """W, differentiable in V."""
        if not torch.compiler.is_compiling() and not self.frozen:
            self._tell_frozen(v)
        if not torch.compiler.is_compiling() and self.shown:
            take_written(self._layer[0])
            traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            if type(v) is nn.Parameter and not traced:  # no copy of the network, nothing functional
                show(self._layer[0])
        return self.input_map.fold(v)

    def _tell_frozen(self, v: Tensor) -> None:
        """Warns, once, if V was frozen since, as adapters (peft) freeze the layer that they are put on.

        They merge into the tensor W that they read, which is computed anew for whoever reads it next.
        """
        if type(v) is nn.Parameter and not v.requires_grad and torch.is_grad_enabled():
            self.frozen = True
            what = "was frozen after attach: it is not trained, and what is merged into it (LoRA) is lost"
            _LOGGER.warning("%s %s; call equalize.fold before merging", self.key, what)

    def right_inverse(self, w: Tensor) -> Tensor:
        """V."""
        return self.input_map.unfold(w)

    def exact(self, v: Tensor) -> Tensor:
        """W, (O, I/G, *K), without the rounding of W -> V -> W."""
        start = self.start.to(v)
        changed = v.detach() != self.right_inverse(start)
        return self.input_map.fold(v.detach()).where(changed, start)


class ShiftedBias(nn.Module):
    """a' -> a = a' - s(V)."""

    def __init__(self, layer: nn.Module, weight: str, bias: Tensor, mean_I: Tensor, geometry: Geometry) -> None:
        super().__init__()
        self._layer = (layer,)
        self.weight = weight
        self.start = bias.detach().clone()
        self.mean_I = mean_I
        self.geometry = geometry

    def _folded(self, bias: Tensor) -> tuple[FoldedWeight, Tensor]:
        """The parametrization of the weight beside this bias, and the V of this moment, where the bias is.

        In `nn.DataParallel`'s copies of the network on other GPUs the layer is still the first one's.
        """
        parametrization = parametrizations(self._layer[0])[self.weight]
        folded = parametrization[0]
        assert isinstance(folded, FoldedWeight)
        return folded, parametrization.original.to(bias.device)

    def shift(self, w: Tensor) -> Tensor:
        """s (O,)."""
        return shift_of(w, self.mean_I, self.geometry)

    def forward(self, shifted: Tensor) -> Tensor:
        """The bias a, differentiable in a' and V."""
        folded, v = self._folded(shifted)
        return shifted - self.shift(folded(v))

    def right_inverse(self, bias: Tensor) -> Tensor:
        """The bias a' that goes with the V of this moment."""
        folded, v = self._folded(bias)
        return bias + self.shift(folded.input_map.fold(v.detach()))

    def exact(self, shifted: Tensor) -> Tensor:
        """The bias (O,), with its original bits where neither it nor V has changed."""
        folded, v = self._folded(shifted)
        start = self.start.to(shifted)
        v_start = folded.right_inverse(folded.start.to(v))
        moved = shifted.detach() != start + self.shift(folded.input_map.fold(v_start))
        plain = shifted.detach() - self.shift(folded.input_map.fold(v.detach()))
        return plain.where(moved | (v.detach() != v_start).any(), start)


def parametrizations(layer: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """All parametrizations of a layer, by the name of the tensor; none if it has none."""
    # a compiled module has the attribute of the one that it wraps; one in TorchScript has no `get`
    lists = dict(layer._modules.items()).get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return {}
    return {name: each for name, each in lists.items() if isinstance(each, parametrize.ParametrizationList)}


def attached(layer: nn.Module) -> dict[str, tuple[FoldedWeight | ShiftedBias, nn.Parameter]]:
    """Of a layer that `attach` parametrized: its parametrizations and originals, the weight's first; else none."""
    found: dict[str, tuple[FoldedWeight | ShiftedBias, nn.Parameter]] = {}
    for name, each in parametrizations(layer).items():  # in the order of `attach`
        if isinstance(ours := each[0], FoldedWeight | ShiftedBias):
            found[name] = (ours, each.get_parameter("original"))
    return found


def demand_folded(model: nn.Module) -> None:
    """Refuses a network with an attached layer, whose weights are none that can be rewritten, by a SiteError."""
    for path, layer in nn.Module.named_modules(model):
        if attached(layer):
            raise SiteError(path, "is attached to a plan", remedy="call fold first")


def plain_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """W and the bias of an attached layer, bit for bit what they were where nothing has changed."""
    return {name: each.exact(original) for name, (each, original) in attached(layer).items()}


def originals(layer: nn.Module, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """V and a' that give these plain tensors: all of the layer's, which are from now on its unchanged ones."""
    found: dict[str, Tensor] = {}
    v = torch.empty(0)
    folded: FoldedWeight | None = None
    for name, (each, _) in attached(layer).items():
        each.start = plain[name].detach().clone()
        if isinstance(each, FoldedWeight):
            folded, v = each, each.right_inverse(each.start)
            found[name] = v
        elif folded is not None:
            found[name] = each.start + each.shift(folded.input_map.fold(v))
    return found


def set_plain(layer: nn.Module, plain: Mapping[str, Tensor]) -> None:
    """Sets V and a' in place, so that the layer's plain tensors are these: all of them."""
    with torch.inference_mode(False), torch.no_grad():
        new = originals(layer, plain)
        for name, (_, original) in attached(layer).items():
            original.copy_(new[name])


def take_written(layer: nn.Module) -> None:
    """Takes in what was written into the tensors of a state dict, as averages of weights are often kept."""
    for folded, _ in attached(layer).values():
        if not isinstance(folded, FoldedWeight):
            continue
        if any(tensor._version != version for tensor, version in folded.shown.values()):
            plain = {name: tensor for name, (tensor, _) in folded.shown.items()}
            folded.shown = {name: (tensor, tensor._version) for name, tensor in plain.items()}
            set_plain(layer, plain)


def show(layer: nn.Module) -> None:
    """Writes what a layer's plain tensors are now into those of its last state dict, as whoever kept it expects."""
    with torch.inference_mode(False), torch.no_grad():
        for folded, _ in attached(layer).values():
            if isinstance(folded, FoldedWeight) and folded.shown:
                plain = plain_tensors(layer)
                for name, (tensor, _) in folded.shown.items():
                    if (tensor.device, tensor.dtype) == (plain[name].device, plain[name].dtype):
                        tensor.copy_(plain[name])
                folded.shown = {name: (tensor, tensor._version) for name, (tensor, _) in folded.shown.items()}
