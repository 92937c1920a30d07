"""Which fusion weights are still as a plan left them: equalized again, their factors would be squared."""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from equalize.errors import SiteError
from equalize.graph.recorder import named_tensors
from equalize.plan.edits import Edit, ScaleInputs

_LEFT: WeakKeyDictionary[nn.Module, dict[str, tuple[float, float]]] = WeakKeyDictionary()


def demand_not_rewritten(model: nn.Module, weights: Iterable[str]) -> None:
    """Refuses weights that hold what an earlier plan made of them, in this process, by a SiteError.

    Weights that were trained, loaded or drawn since are others.
    """
    left, tensors = _LEFT.get(model, {}), named_tensors(model)
    for key in weights:
        if key in left and key in tensors and left[key] == _content(tensors[key]):
            raise SiteError(key, "is already equalized, by an earlier call", remedy="load the model again first")


def remember_rewritten(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Keeps what the edits made of the weights whose inputs they scaled."""
    tensors = named_tensors(model)
    scaled = {edit.tensor for edit in edits if isinstance(edit, ScaleInputs)}
    _LEFT[model] = _LEFT.get(model, {}) | {key: _content(tensors[key]) for key in scaled}


def _content(tensor: Tensor) -> tuple[float, float]:
    values = tensor.detach().cpu().double()
    return float(values.sum()), float(values.square().sum())
