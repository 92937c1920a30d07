"""Notes what a network's last sigmoid or softmax was given: outputs that are probabilities and no logits."""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

THRESHOLDS = {
    **dict.fromkeys(("sigmoid", "softmax", "hardsigmoid", "special_expit"), 0.5),
    **dict.fromkeys(("log_sigmoid", "log_softmax", "special_log_softmax"), math.log(0.5)),
}
"""Functions that make probabilities, or their logarithms: above which value a class is more likely than not."""
_KEEPING = frozenset(
    {"interpolate", "upsample", "clamp", "clip", "contiguous", "clone", "to", "float", "type", "type_as", "dropout"}
)
"""Functions after which probabilities are still those of the same pixels, perhaps at another resolution."""


class Activations(TorchFunctionMode):
    """While it is entered, notes for each result of a sigmoid or softmax over classes the tensor before it."""

    def __init__(self) -> None:
        super().__init__()
        self._before: MutableMapping[Tensor, tuple[Tensor, str]] = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carries a call out, and notes it."""
        kwargs = kwargs or {}
        called = getattr(func, "__name__", "")
        name = called if called.startswith("__") else called.removesuffix("_")
        source = args[0] if args else kwargs.get("input")
        if not isinstance(source, Tensor) or (name not in THRESHOLDS.keys() | _KEEPING and name != "__getitem__"):
            return func(*args, **kwargs)
        in_place = name != called or any(each is True for each in (*args[1:2], kwargs.get("inplace")))
        if name in THRESHOLDS and _over_classes(name, source, args[1:], kwargs):
            noted = (source.clone() if in_place else source, name)
            result = func(*args, **kwargs)
            self._before[result] = noted
            return result
        found = self._before.get(source)
        result = func(*args, **kwargs)
        kept = isinstance(result, Tensor) and (name != "__getitem__" or result.shape[2:] == source.shape[2:])
        if found is not None and kept and result is not source:
            self._before[result] = found
        return result

    def before(self, tensor: Tensor) -> Tensor | None:
        """What the sigmoid or softmax was given that gave a tensor; None if none did."""
        return self._before.get(tensor, (None, None))[0]

    def name(self, tensor: Tensor) -> str | None:
        """The name of the function that gave a tensor's probabilities; None if none did."""
        return self._before.get(tensor, (None, None))[1]


def _over_classes(name: str, source: Tensor, others: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a softmax runs along axis 1, as it does by default on images; a sigmoid always does."""
    if not name.endswith("softmax"):
        return source.ndim > 2
    dim = kwargs.get("dim", others[0] if others else None)
    return source.ndim > 3 and isinstance(dim, int | None) and (1 if dim is None else dim % source.ndim) == 1
