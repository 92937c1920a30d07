"""Watching the inputs of named layers while the real network runs, without touching the network.

A torch-function mode sees every call of a convolution, linear layer or batch normalisation and recognises a watched
one by the identity of its parameter, so layers that are called functionally are seen as well. No hook is installed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from equalize.errors import SiteError

__all__ = ["Batch", "Call", "images_in", "inputs_of", "run", "undisturbed"]

Batch = Tensor | tuple[Tensor, ...]

_READERS = frozenset(
    [
        "linear",
        "batch_norm",
        "convolution",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ]
)


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
        """The layer's output, with `input`, `weight` or `bias` replaced; not for batch normalisations."""
        arguments = self._args | replaced
        return self._function(
            arguments["input"], arguments["weight"], arguments.get("bias"), *self._rest, **self._kwargs
        )


Handler = Callable[[Call], None]


class _Done(BaseException):
    """Every watched layer has been seen: the rest of the forward pass is not needed."""


class _Watch(TorchFunctionMode):
    def __init__(self, handlers: Mapping[int, Handler], *, stop: bool) -> None:
        super().__init__()
        self.handlers = handlers
        self.stop = stop
        self.seen: set[int] = set()
        self.padding: tuple[Tensor, Tensor] | None = None  # input and output of the last padding

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").split(".")[0]
        if name == "pad":
            padded = func(*args, **kwargs)
            self.padding = (args[0], padded) if args else None
            return padded
        if name in _READERS:
            for argument in (*args[1:3], *kwargs.values()):
                if id(argument) in self.handlers:
                    if self.stop and len(self.seen) == len(self.handlers):
                        raise _Done
                    _demand_real(kwargs.get("input", args[0] if args else None), argument)
                    self.handlers[id(argument)](Call(func, args, kwargs, self.padding))
                    self.seen.add(id(argument))
                    if self.stop and len(self.seen) == len(self.handlers):
                        raise _Done
        return func(*args, **kwargs)


def _demand_real(data: Any, parameter: Any) -> None:
    """Tracing runs a network on fake tensors; one kept in a cache outside the modules spoils every run that follows."""
    if isinstance(data, FakeTensor) and not isinstance(parameter, FakeTensor):
        raise SiteError(
            "the network",
            "keeps tensors from when it was traced, in a cache outside its modules",
            remedy="build it anew, clear the cache, and run it once before it is scanned",
        )


def run(
    model: nn.Module,
    handlers: Mapping[str, Handler],
    batches: Iterable[Batch],
    *,
    stop: bool = True,
    strict: bool = True,
) -> Iterator[Any]:
    """Runs `model` over `batches` and hands every call of a watched layer to its handler.

    Args:
        model: run as it stands; wrap the loop in `undisturbed`.
        handlers: by the state-dict key of a fusion weight, or of a BatchNorm's `running_mean`.
        batches: what the network takes, moved to its device.
        stop: end each forward pass at the last watched layer.
        strict: whether every watched layer must be called.

    Yields:
        After each batch, the network's output, or None where the pass was stopped.

    Raises:
        SiteError: if `strict` and a watched layer was not called.
    """
    tensors = dict(nn.Module.named_parameters(model, remove_duplicate=False)) | dict(
        nn.Module.named_buffers(model, remove_duplicate=False)
    )
    watched = {id(tensors[key]): handler for key, handler in handlers.items()}
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    for batch in batches:
        watch = _Watch(watched, stop=stop)
        output = None
        with contextlib.suppress(_Done), watch:
            output = model(*(tensor.to(device, non_blocking=tensor.is_pinned()) for tensor in inputs_of(batch)))
        missed = [key for key in handlers if id(tensors[key]) not in watch.seen]
        if missed and strict:
            raise SiteError(
                missed[0], "was not called when the network ran", remedy="trace it with an input like the data"
            )
        yield output


def inputs_of(batch: Batch) -> tuple[Tensor, ...]:
    """A batch as the network's positional arguments.

    Raises:
        SiteError: if it holds anything but tensors.
    """
    inputs = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    if not all(isinstance(each, Tensor) for each in inputs):
        raise SiteError("batches", "must be tensors or tuples of tensors", got=type(batch).__name__)
    return inputs


def images_in(batch: Batch) -> int:
    """How many images a batch has."""
    first = inputs_of(batch)[0]
    return len(first) if first.ndim else 1


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, full float32 matrix products; afterwards everything is as it was found.

    Restored, also after an interruption: the mode of every module, every buffer, the random state, TF32 switches.
    """
    modes = [(module, module.training) for module in nn.Module.modules(model)]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in nn.Module.modules(model)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    devices = sorted(
        {tensor.device.index or 0 for tensor in nn.Module.parameters(model) if tensor.device.type == "cuda"}
    )
    try:
        model.eval()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)  # a forward pass may also have put another in its place
        for module, training in modes:
            module.training = training
