"""A factory -> a model with fresh weights, or on the meta device."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equalize.checkpoint.limits import limit_construction
from equalize.errors import CheckpointError

__all__ = ["build", "class_argument", "construct", "json_arguments", "seeded"]

_CLASS_ARGUMENTS = ("num_classes", "classes", "n_classes", "num_labels")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw under a seed and give torch's generator back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build(
    make: Callable[[], nn.Module],
    name: str,
    tensors: Mapping[str, Tensor] | None,
    *,
    limited: bool,
    on_meta: bool = False,
    draw: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A network as a checkpoint describes it, no larger than what there is to fill it.

    Args:
        make: builds it with fresh weights.
        name: for errors.
        tensors: that will fill it; None where only its structure is wanted.
        limited: whether to hold it to those.
        on_meta: put all of it on the meta device.
        draw: whether parts of it may have no tensors.
        seed: of the draw.

    Raises:
        CheckpointError: it cannot be built.
    """
    with limit_construction(tensors, draw=draw) if limited else nullcontext():
        return construct(make, name, on_meta=on_meta, seed=seed)


def construct(make: Callable[[], nn.Module], name: str, *, on_meta: bool = False, seed: int = 0) -> nn.Module:
    """Call a factory under a seed, on the CPU or on the meta device, where nothing takes memory.

    Raises:
        CheckpointError: the factory raises, or returns something that is not a module.
    """
    try:
        with seeded(seed):
            model = _on_meta(make) if on_meta else make()
    except (Exception, SystemExit) as error:  # whatever a factory raises is an answer to the arguments it was given
        line = " ".join(str(error).split())[:160]
        raise CheckpointError(
            name, f"cannot be built ({type(error).__name__}: {line})", remedy="check --arch and --arch-arg"
        ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(name, "is no model factory", got=type(model).__name__, expected="a torch.nn.Module")
    return model.eval()


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return make()
    except Exception:  # some constructors read values (`torch.linspace(…).item()`), which meta tensors lack
        with _StorageOnMeta():
            model = make()
        return model.to("meta") if isinstance(model, nn.Module) else model


class _StorageOnMeta(TorchFunctionMode):
    """Puts what is made to be filled, as parameters are, on the meta device; ranges of values stay real."""

    _FILLED = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FILLED and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def class_argument(factory: Callable[..., object], arch: str) -> str:
    """The name under which a factory takes the number of classes.

    Raises:
        CheckpointError: it has none of the usual names.
    """
    parameters = inspect.signature(factory).parameters
    for name in _CLASS_ARGUMENTS:
        if name in parameters:
            return name
    raise CheckpointError(
        arch,
        "takes no number of classes under a usual name",
        expected=", ".join(_CLASS_ARGUMENTS),
        remedy="give it with --arch-arg instead of --num-classes",
    )


def json_arguments(arguments: Mapping[str, object]) -> dict[str, object] | None:
    """The arguments if JSON can hold them, to be written beside a state dict; else None."""
    try:
        return dict(json.loads(json.dumps(dict(arguments))))
    except (TypeError, ValueError):
        return None
