"""Records one run of a network that `torch.export` refuses as the same kind of graph of ATen calls.

Export refuses values that reach Python: `.item()`, `.tolist()`, numpy, control flow. A run on real tensors has them.
Calls are recorded before autograd and autocast decompose them, as export does, so both give the same operators. The
record is valid for the control flow that this input took.
"""

import contextlib
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from equalize.eval_mode import eval_mode
from equalize.graph.fx_reader import read_ops
from equalize.graph.graph import Op

# Operators by which the values of a tensor reach Python; `.numpy()` and `.tolist()` come by as the last of them.
_READS_VALUES = frozenset({"item", "_local_scalar_dense", "is_nonzero", "equal", "resolve_neg"})

_MOST_DRAWN = 1 << 27  # half a gigabyte: a configuration alone may describe more


def record(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[Op, ...]:
    """Runs `model` in eval mode and gives the ops that it calls; it is left as it was.

    For parameters, buffers and inputs on the meta device values are drawn. Exceptions of the network's code propagate.
    """
    with eval_mode(model, attributes=True):
        torch.manual_seed(0)
        tensors = _for_the_run(model)
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        inputs = tuple(_input(tensor, device) for tensor in example)
        recorder = _Recorder(tensors)
        for tensor, name in zip(inputs, _names_of_inputs(model), strict=False):
            recorder.placeholder(tensor, name)
        as_written = torch.compiler.set_stance("force_eager")  # compiled code would not be recorded
        with as_written, recorder.following(model), enable_python_dispatcher(), recorder:
            output = torch.func.functional_call(model, tensors, inputs)
        recorder.graph.output(tuple(recorder.node(tensor) for tensor in _tensors(output)))
    return read_ops(recorder.graph, model, keys=recorder.keys, plain=_plain(model))


def _plain(model: nn.Module) -> frozenset[str]:
    """The parameters of layers written in Python; those of TorchScript can be neither observed nor replaced."""
    return frozenset(
        name
        for path, module in nn.Module.named_modules(model, remove_duplicate=False)
        if not isinstance(module, torch.jit.ScriptModule)
        for name, _ in nn.Module.named_parameters(module, path, recurse=False)
    )


def _for_the_run(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters, copies of its buffers, and draws for what is on the meta device, by name."""
    named = {
        **dict(nn.Module.named_parameters(model, remove_duplicate=False)),
        **dict(nn.Module.named_buffers(model, remove_duplicate=False)),
    }
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


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors of whatever a network returns, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each)
    elif is_dataclass(output):
        yield from _tensors(tuple(getattr(output, field.name) for field in fields(output)))


class _Recorder(SchemaCheckMode):  # type: ignore[no-untyped-call]
    """Writes every ATen call into an fx graph.

    Torch passes calls to few modes before autograd; for real tensors that is the schema check, hence this base class,
    whose checks are not made.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["_dispatch_key"] = torch._C.DispatchKey.PreDispatch
        self.graph = fx.Graph()
        self.keys: dict[str, str] = {}
        self._nodes: MutableMapping[Tensor, fx.Node] = WeakTensorKeyDictionary()  # a freed tensor's id may come again
        self._read: list[fx.Node] = []  # whose values Python has seen
        self._modules: list[tuple[str, str]] = [("", "")]
        self._storages: dict[int, fx.Node] = {}
        for key, tensor in tensors.items():
            if tensor not in self._nodes:
                node = self.placeholder(tensor, key.replace(".", "_"))
                self._storages[tensor.untyped_storage().data_ptr()] = node
            self.keys[self._nodes[tensor].name] = key  # the last of several names, as export has it

    def placeholder(self, tensor: Tensor, name: str) -> fx.Node:
        """A node that stands for a tensor which the network is given."""
        return self._keep(self.graph.create_node("placeholder", name, name=name), tensor)

    @contextlib.contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Keeps track of which of the model's modules is being called."""
        paths = {id(module): path for path, module in nn.Module.named_modules(model)}

        def enter(module: nn.Module, args: object) -> None:
            self._modules.append((paths.get(id(module), self._modules[-1][0]), type(module).__name__))

        def leave(module: nn.Module, args: object, output: object) -> None:
            self._modules.pop()

        with contextlib.ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(enter).remove)
            stack.callback(register_module_forward_hook(leave, always_call=True).remove)
            yield

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carries a call out and appends its node, and one more for each tensor of a result that has several."""
        arguments = self._with_nodes(args), self._with_nodes(kwargs or {})
        result = func(*args, **kwargs or {})
        name = func.__name__.split(".")[0]
        call = self.graph.create_node("call_function", func, *arguments, name=name)
        self._keep(call, result)
        if name in _READS_VALUES:
            self._read.append(call)
        if isinstance(result, list | tuple):
            for index, each in enumerate(result):
                if isinstance(each, Tensor):
                    self._keep(self.graph.call_function(getitem, (call, index)), each)
        for written, argument in zip(func._schema.arguments, args, strict=False):
            if written.is_write and isinstance(argument, Tensor) and argument is not result:
                self._nodes[argument] = call
        return result

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that made a tensor."""
        if tensor in self._nodes:
            return self._nodes[tensor]
        stored = tensor.layout is torch.strided and tensor.numel() > 0
        parameter = self._storages.get(tensor.untyped_storage().data_ptr()) if stored else None
        if parameter is not None:  # such as `weight.data`
            made = self.graph.call_function(torch.ops.aten.alias.default, (parameter,))
        elif self._read:  # made outside torch from values that Python has read
            made = self.graph.call_function(values_of, tuple(self._read))
        else:
            made = self.graph.create_node("get_attr", "constant", name="constant")
        return self._keep(made, tensor)

    def _keep(self, node: fx.Node, result: object) -> fx.Node:
        node.meta["nn_module_stack"] = {"": self._modules[-1]}
        if isinstance(result, Tensor):
            self._nodes[result] = node
            result = _shape_of(result)
        elif isinstance(result, list | tuple):
            result = [_shape_of(each) for each in result if isinstance(each, Tensor)]
        node.meta["val"] = result
        return node

    def _with_nodes(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.node(argument)
        if isinstance(argument, list | tuple):
            return tuple(self._with_nodes(each) for each in argument)
        if isinstance(argument, dict):
            return {key: self._with_nodes(each) for key, each in argument.items()}
        return argument if isinstance(argument, fx.node.base_types) else str(argument)


def values_of(*tensors: Tensor) -> Tensor:
    """Stands in a graph for what was computed from the values of tensors outside torch."""
    raise NotImplementedError


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
