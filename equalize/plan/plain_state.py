"""State dicts of attached layers hold plain weights: W and the bias under the keys that the layer had, in its order.

Hooks on the layer turn V into W as a state dict leaves and W into V as one is loaded, in place, so that the optimizer's
references stay. What was saved is therefore what the network's own library loads; state dicts of originals
(`parametrizations.weight.original`) are loaded as well. Weights that lie in parts in several processes leave as V: no
process has what W is computed from.

A state dict of torch shares memory with the network: averages of weights are often written into it
(`for value in average.state_dict().values(): value.lerp_(...)`), and one that is kept without copying it is that of the
last step. W is computed, so the tensors that were handed out are kept; what was written into them is taken in
(`parametrization.take_written`), and they follow the layer (`show`), lest a kept one mix its weights with later ones.
"""

import copy
import operator
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from equalize.plan.parametrization import (
    FoldedWeight,
    attached,
    originals,
    plain_tensors,
    set_plain,
    show,
    take_written,
)

_State = MutableMapping[str, Any]


def register_plain_state(layer: nn.Module, unparametrized: Callable[[nn.Module], None]) -> None:
    """Registers the hooks on a layer that was just attached.

    Args:
        unparametrized: `fold`; what pickles the layer whole, as `torch.save(model)` does, gets a folded copy.
    """
    layer.register_state_dict_post_hook(_plain_out)  # type: ignore[no-untyped-call]
    layer.register_load_state_dict_pre_hook(_plain_in)  # type: ignore[no-untyped-call]

    kind: Any = type(layer)  # torch made it for this layer alone
    deepcopy = kind.__deepcopy__

    def copied(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        take_written(self)
        twin: nn.Module = deepcopy(self, memo)
        for folded, _ in attached(twin).values():
            if isinstance(folded, FoldedWeight):
                folded.shown = {}  # state dicts hold the tensors of the one that was copied
        return twin

    def reduced(self: nn.Module, protocol: Any) -> Any:
        twin = copy.deepcopy(self)
        unparametrized(twin)
        return operator.getitem, ([twin], 0)  # itself, without a name of ours in the pickle

    kind.__deepcopy__, kind.__reduce_ex__ = copied, reduced


def remove_plain_state(layer: nn.Module) -> None:
    """Removes the hooks; by what they call, as handles do not survive copies."""
    for hooks in (layer._state_dict_hooks, layer._load_state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (_plain_out, _plain_in)]:
            del hooks[key]


def settle(model: nn.Module) -> None:
    """Brings V to what loading the network's state dict would make of it: W -> V rounds.

    A training that does so after saving goes on from the bits that a resumed one starts with.
    """
    for layer in nn.Module.modules(model):
        if (found := attached(layer)) and not _in_parts(found):
            set_plain(layer, plain_tensors(layer))


def _in_parts(found: dict[str, tuple[Any, nn.Parameter]]) -> bool:
    """Whether the originals are shards, of FSDP or DeepSpeed."""
    return any(is_traceable_wrapper_subclass(each) or each.shape != mine.start.shape for mine, each in found.values())


def _raw(prefix: str, name: str) -> str:
    return f"{prefix}parametrizations.{name}.original"


def _plain_out(layer: nn.Module, state: _State, prefix: str, metadata: Any) -> None:
    """After `state_dict` of a layer and its children."""
    found = attached(layer)
    if not found or _in_parts(found) or any(_raw(prefix, name) not in state for name in found):
        return
    folded = next(each for each, _ in found.values() if isinstance(each, FoldedWeight))
    with torch.inference_mode(False), torch.no_grad():
        take_written(layer)
        for name, (_, original) in found.items():
            folded.shown[name] = _handed_out(folded.shown.get(name), original)
        show(layer)
    of_layer = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    for name in found:
        del of_layer[_raw(prefix, name)]
        of_layer[f"{prefix}{name}"] = folded.shown[name][0]
    own = [key for name in folded.order if (key := f"{prefix}{name}") in of_layer]
    state.update({key: of_layer[key] for key in dict.fromkeys((*own, *of_layer))})


def _handed_out(shown: tuple[Tensor, int] | None, original: Tensor) -> tuple[Tensor, int]:
    """The tensor that was handed out before, so that whoever kept a state dict sees the values of now, as ever.

    The first one has the layout of the parameter, which safetensors may insist on.
    """
    if shown is None or (shown[0].device, shown[0].dtype) != (original.device, original.dtype):
        return torch.empty_like(original), 0
    return shown


def _plain_in(layer: nn.Module, state: _State, prefix: str, metadata: Any, strict: bool, *reports: list[str]) -> None:
    """Before a layer's children load: replaces plain tensors by the originals that give them.

    `reports` collect missing keys, unexpected keys and errors; they name plain keys.
    """
    found = attached(layer)
    if not found or _in_parts(found) or any(_raw(prefix, name) in state for name in found):
        return
    missing, _, errors = reports
    assign = metadata.get("assign_to_params_buffers", False)
    given: dict[str, Tensor] = {}
    take_written(layer)
    show(layer)  # a state dict that was kept and comes back is of now, as its other tensors are
    for name, (_, original) in found.items():
        key = f"{prefix}{name}"
        value = state.pop(key, None)
        if isinstance(value, Tensor) and value.shape == original.shape:
            given[name] = value if assign else value.to(original)
        elif value is None:
            missing.append(key)
        else:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            errors.append(f"size mismatch for {key}: got {got}, expected {tuple(original.shape)}.")
    with torch.inference_mode(False), torch.no_grad():
        if given:
            plain = given if len(given) == len(found) else plain_tensors(layer) | given
            new: dict[str, Tensor] = originals(layer, plain)
        else:
            new = {name: original for name, (_, original) in found.items()}
    state.update({_raw(prefix, name): tensor for name, tensor in new.items()})
