"""Observing the inputs of named layers while the real network runs, without changing the network.

A torch-function mode gets every call of a convolution, linear layer or batch normalization and recognizes a watched
one by the identity of its parameter, so layers that are called functionally are seen as well. No hook is installed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from equalize.errors import SiteError
from equalize.eval_mode import refusing
from equalize.graph.recorder import named_tensors

Batch = Tensor | tuple[Tensor, ...]

_READERS = {"linear", "batch_norm", "instance_norm", "convolution"} | {
    f"conv{transposed}{axes}d" for transposed in ("", "_transpose") for axes in (1, 2, 3)
}


class Call:
    """One call of a watched layer, before it is carried out.

    Attributes:
        data: its input, as (N, C, *) or (N, *, C) for a linear layer.
        unpadded: the same before a padding function that made it.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        padding: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        names = ("input", "weight", "bias")
        self._function = function
        self._args = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        self._rest = args[len(names) :]
        self._kwargs = {key: value for key, value in kwargs.items() if key not in names}
        self.data: Tensor = self._args["input"]
        self.unpadded = padding[0] if padding is not None and padding[1] is self.data else self.data

    def __call__(self, **replaced: Tensor | None) -> Tensor:
        """The layer's output, with `input`, `weight` or `bias` replaced; not for batch normalizations."""
        arguments = self._args | replaced
        return self._function(
            arguments["input"], arguments["weight"], arguments.get("bias"), *self._rest, **self._kwargs
        )


Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed(Generic[Result]):
    """One forward pass: what the observers returned for each call, by the key of the watched layer.

    `output` is the network's; None where the pass was ended after the last watched layer.
    """

    results: Mapping[str, list[Result]]
    output: Any


class _Done(BaseException):
    """Raised when every watched layer was called: the rest of the forward pass is not needed."""


class _Watch(TorchFunctionMode, Generic[Result]):
    def __init__(self, observers: Mapping[int, Callable[[Call], Result]], *, stop: bool) -> None:
        super().__init__()
        self.observers = observers
        self.stop = stop
        self.results: dict[int, list[Result]] = {}
        self.padding: tuple[Tensor, Tensor] | None = None  # input and output of the last padding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").split(".")[0]
        if name == "pad":
            padded = func(*args, **kwargs)
            self.padding = (args[0], padded) if args else None
            return padded
        if name in _READERS:
            for argument in (*args[1:], *kwargs.values()):
                if id(argument) in self.observers:
                    if self._done():
                        raise _Done
                    _demand_real(kwargs.get("input", args[0] if args else None), argument)
                    result = self.observers[id(argument)](Call(func, args, kwargs, self.padding))
                    self.results.setdefault(id(argument), []).append(result)
                    if self._done():
                        raise _Done
        return func(*args, **kwargs)

    def _done(self) -> bool:
        return self.stop and len(self.results) == len(self.observers)


def _demand_real(data: Any, parameter: Any) -> None:
    """Tracing runs a network on fake tensors; one in a cache outside the modules breaks later runs."""
    if isinstance(data, FakeTensor) and not isinstance(parameter, FakeTensor):
        raise SiteError(
            "the network",
            "keeps tensors from when it was traced, in a cache outside its modules",
            remedy="build it anew, clear the cache, and run it once before it is scanned",
        )


def observe(
    model: nn.Module,
    observers: Mapping[str, Callable[[Call], Result]],
    batches: Iterable[Batch],
    *,
    stop: bool = True,
    strict: bool = True,
) -> Iterator[Observed[Result]]:
    """Runs `model` over `batches` and lets observers see every call of a watched layer before it is carried out.

    Args:
        model: run as it stands, on its device; wrap the loop in `eval_mode`.
        observers: by the state-dict key of a fusion weight, or of a BatchNorm's `running_mean`.
        stop: end each forward pass at the last watched layer.
        strict: whether every watched layer must be called; a SiteError says which was not.
    """
    tensors = demand_tensors(model, observers)
    watched = {id(tensors[key]): observer for key, observer in observers.items()}
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    for batch in batches:
        watch = _Watch(watched, stop=stop)
        output = None
        with contextlib.suppress(_Done), watch:
            inputs = tuple(tensor.to(device, non_blocking=tensor.is_pinned()) for tensor in inputs_of(batch))
            with refusing(partial(_refused, inputs)):
                output = model(*inputs)
        missed = [key for key in observers if id(tensors[key]) not in watch.results]
        if missed and strict:
            what = "was not called when the network ran"
            raise SiteError(missed[0], what, remedy="trace it with an input like the data")
        results = {key: watch.results.get(id(tensors[key]), []) for key in observers}
        yield Observed(results=results, output=output)


def _refused(inputs: tuple[Tensor, ...], reason: str) -> SiteError:
    shapes = " and ".join(str(list(tensor.shape)) for tensor in inputs)
    what = f"does not take an input of shape {shapes} ({reason})"
    return SiteError("the network", what, remedy="bring all images to a size that it takes (--size)")


def demand_tensors(model: nn.Module, keys: Iterable[str]) -> dict[str, Tensor]:
    """As `named_tensors`; a SiteError if a key is not among them."""
    tensors = named_tensors(model)
    for key in keys:
        if key not in tensors:
            raise SiteError(key, "is not in this model", remedy="give the sites of a scan of this model")
    return tensors


def inputs_of(batch: Batch) -> tuple[Tensor, ...]:
    """A batch as the network's positional arguments; a SiteError if it holds anything but tensors."""
    inputs = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    if not all(isinstance(each, Tensor) for each in inputs):
        raise SiteError("batches", "must be tensors or tuples of tensors", got=type(batch).__name__)
    return inputs


def images_in(batch: Batch) -> int:
    """How many images a batch has."""
    first = inputs_of(batch)[0]
    return len(first) if first.ndim else 1
