"""Records the ATen calls of one forward pass as the same kind of graph that `torch.export` gives.

On fake tensors nothing is computed; that suffices where shapes alone decide what a network does. Values that reach
Python (`.item()`, `.tolist()`, numpy, control flow) need a run on real tensors, and its record is valid for the control
flow that this input took. Calls are recorded before autograd and autocast decompose them, as export does, so all three
give the same operators; a recording costs a fraction of an export, which solves for symbolic sizes and guards.
"""

import contextlib
import functools
import gc
import inspect
import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from equalize.eval_mode import eval_mode, set_containers_training
from equalize.graph.fx_reader import read_ops
from equalize.graph.graph import Op
from equalize.graph.recorder import Recorder, named_tensors, tensors_in
from equalize.seeded import seeded

_MOST_DRAWN = 1 << 27  # half a gigabyte: a configuration alone may describe more


Call = Callable[..., object]
"""A way to run a network, called with it and its inputs."""


class _Called(nn.Module):
    """A network that is run in some way."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network = network
        self.call = call

    def forward(self, *inputs: Tensor) -> object:
        return self.call(self.network, *inputs)


def record(
    model: nn.Module, example: tuple[Tensor, ...], call: Call = operator.call, *, training: bool = False
) -> tuple[Op, ...]:
    """Runs `model` in eval mode and gives the ops that it calls; it is left as it was.

    For parameters, buffers and inputs on the meta device values are drawn. Exceptions of the network's code propagate.
    `training`: see `set_containers_training`.
    """
    with eval_mode(model, attributes=True), seeded(0):
        tensors = _for_the_run(model)
        device = _device_of(tensors)
        if training:
            set_containers_training(model)
        return _recorded(_Called(model, call), tensors, tuple(_input(tensor, device) for tensor in example))


def record_fake(
    model: nn.Module, example: tuple[Tensor, ...], call: Call = operator.call, *, training: bool = False
) -> tuple[Op, ...]:
    """The ops that `model` calls in eval mode on fake tensors, which take no memory; it is left as it was.

    What is recorded is complete or refused, by any exception: where the network's code asks for values or calls what
    has no rule for fake tensors, or a tensor turns up that no recorded call made. `training`: as of `record`.
    """
    try:
        with eval_mode(model, attributes=True), FakeTensorMode(allow_non_fake_inputs=True) as mode, _compiling():
            named = named_tensors(model)
            device = _device_of(named)
            fakes = {id(tensor): _faked(tensor, mode, device) for tensor in named.values()}
            inputs = tuple(torch.empty_like(tensor, device=device) for tensor in example)
            if training:
                set_containers_training(model)
            return _recorded(_Called(model, call), {name: fakes[id(each)] for name, each in named.items()}, inputs)
    finally:
        _clear_caches(model)


def _recorded(called: _Called, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Op, ...]:
    """The ops of a call on these parameters and buffers, by name."""
    model, recorder = called.network, Recorder(tensors)
    given = {f"network.{name}": tensor for name, tensor in tensors.items()}
    for tensor, name in zip(inputs, _names_of_inputs(model), strict=False):
        recorder.placeholder(tensor, name)
    as_written = torch.compiler.set_stance("force_eager")  # compiled code would not be recorded
    with as_written, _without_fast_path(), recorder.following(model), enable_python_dispatcher(), recorder:
        output = torch.func.functional_call(called, given, inputs)
    recorder.check()
    returned = tuple(recorder.node(tensor) for tensor in tensors_in(output))
    recorder.graph.output((*returned, *recorder.kept_by(model)))
    return read_ops(recorder.graph, model, keys=recorder.keys, plain=_plain(model))


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Sets what libraries ask before they keep tensors for the next run, or check values, as export sets it."""
    before = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = before


def _clear_caches(model: nn.Module) -> None:
    """Empties caches of functions beside the network's code that now hold fake tensors: a run would be given them."""
    classes = {kind for module in nn.Module.modules(model) for kind in type(module).__mro__}
    spaces = [*map(vars, classes), *(vars(sys.modules.get(kind.__module__, kind)) for kind in classes)]
    for function in {each for space in spaces for each in space.values() if type(each) is functools._lru_cache_wrapper}:
        if any(isinstance(tensor, FakeTensor) for tensor in tensors_in(gc.get_referents(function))):
            function.cache_clear()


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Attention as its modules are written, as under export, not as the one operator that inference has for it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _plain(model: nn.Module) -> frozenset[str]:
    """The parameters of layers written in Python; those of TorchScript can be neither observed nor replaced."""
    return frozenset(
        name
        for path, module in nn.Module.named_modules(model, remove_duplicate=False)
        if not isinstance(module, torch.jit.ScriptModule)
        for name, _ in nn.Module.named_parameters(module, path, recurse=False)
    )


def _device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    """The device of a network; of one on the meta device the CPU, where values are drawn or feigned."""
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _faked(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    if not tensor.is_meta:
        return mode.from_tensor(tensor)
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _for_the_run(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters, copies of its buffers, and draws for what is on the meta device, by name."""
    named = named_tensors(model)
    missing = {id(tensor): tensor.numel() for tensor in named.values() if tensor.is_meta}
    if sum(missing.values()) > _MOST_DRAWN:
        raise ValueError("it is too large to be run on weights that are drawn for that")
    own: dict[int, Tensor] = {}  # a tensor of several names stays one
    for name, tensor in named.items():
        if id(tensor) not in own:
            kept = tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
            own[id(tensor)] = _draw(name, tensor) if tensor.is_meta else kept
    return {name: own[id(tensor)] for name, tensor in named.items()}


def _draw(name: str, tensor: Tensor) -> Tensor:
    """Values that keep activations finite: weights by their fan-in, scales and variances one, all else zero."""
    drawn = torch.zeros_like(tensor, device="cpu")
    if not drawn.is_floating_point():
        return drawn
    if drawn.ndim > 1:
        return drawn.normal_(0, math.prod(drawn.shape[1:]) ** -0.5)
    return drawn.fill_(0.0 if name.endswith(("bias", "mean")) else 1.0)


def _input(tensor: Tensor, device: torch.device) -> Tensor:
    if not tensor.is_meta:
        return tensor.to(device, copy=True)  # the network may write into it
    if not tensor.is_floating_point():
        return torch.ones_like(tensor, device=device)
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=device)


def _names_of_inputs(model: nn.Module) -> Iterator[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    named = (each.name for each in parameters if each.kind is not each.VAR_POSITIONAL)
    return itertools.chain(named, itertools.repeat("input"))
