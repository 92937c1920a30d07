"""A factory -> a model with fresh weights, or on the meta device."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from equalize.errors import CheckpointError
from equalize.messages import one_line
from equalize.seeded import seeded

_CLASS_ARGUMENTS = ("num_classes", "classes", "n_classes", "num_labels")


def construct(make: Callable[[], nn.Module], name: str, *, on_meta: bool = False, seed: int = 0) -> nn.Module:
    """Call a factory under a seed, on the CPU or on the meta device, where nothing takes memory; float32, in eval mode.

    A CheckpointError if it raises, or returns something that is not a module.
    """
    try:
        with seeded(seed):
            model = _on_meta(make) if on_meta else make()
    except CheckpointError:
        raise
    except (Exception, SystemExit) as error:  # a factory may raise anything if arguments do not suit it
        what = f"cannot be built ({one_line(error)})"
        raise CheckpointError(name, what, remedy="check --arch and --arch-arg") from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(name, "is no model factory", got=type(model).__name__, expected="a torch.nn.Module")
    dtypes = {parameter.dtype for parameter in nn.Module.parameters(model) if parameter.is_floating_point()}
    return (model if torch.float32 in dtypes else model.float()).eval()


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return make()
    except Exception:  # some constructors read values (`torch.linspace(…).item()`), which meta tensors lack
        with _StorageOnMeta():
            model = make()
        return model.to("meta") if isinstance(model, nn.Module) else model


class _StorageOnMeta(TorchFunctionMode):
    """Allocates the tensors of the functions in `_FILLED` on the meta device; others, such as `linspace`'s, stay real.

    accelerate's ``init_empty_weights`` would untie parameters that a network shares.
    """

    _FILLED = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FILLED and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def class_argument(factory: Callable[..., object], arch: str) -> str:
    """The name under which a factory takes the number of classes; a CheckpointError if it is none of the usual ones."""
    parameters = inspect.signature(factory).parameters
    name = next((name for name in _CLASS_ARGUMENTS if name in parameters), None)
    if name is None:
        what, expected = "takes no number of classes under a usual name", ", ".join(_CLASS_ARGUMENTS)
        raise CheckpointError(arch, what, expected=expected, remedy="give it with --arch-arg instead of --num-classes")
    return name
