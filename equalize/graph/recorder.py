"""A mode that writes every ATen call into an fx graph, before autograd and autocast decompose it."""

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from operator import getitem
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

# Operators by which the values of a tensor reach Python; `.numpy()` and `.tolist()` come by as the last of them.
_READS_VALUES = frozenset({"item", "_local_scalar_dense", "is_nonzero", "equal", "resolve_neg"})


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are not saved, by each of their state-dict keys."""
    return {
        **dict(nn.Module.named_parameters(model, remove_duplicate=False)),
        **dict(nn.Module.named_buffers(model, remove_duplicate=False)),
    }


def tensors_in(output: object) -> Iterator[Tensor]:
    """The tensors of whatever a network returns, in order, also as attributes of objects; modules are left out."""
    seen: dict[int, object] = {}
    stack = [output]
    while stack:
        each = stack.pop()
        if isinstance(each, Tensor):
            yield each
        elif id(each) not in seen and not isinstance(each, nn.Module | type | ModuleType | FunctionType):
            seen[id(each)] = each
            stack += reversed(_parts(each))


def _parts(output: object) -> Sequence[object]:
    if isinstance(output, Mapping):
        return tuple(output.values())
    if isinstance(output, list | tuple | set | frozenset | deque):
        return tuple(output)
    if is_dataclass(output):
        return tuple(getattr(output, field.name, None) for field in fields(output))
    return tuple(getattr(output, "__dict__", {}).values())


class Recorder(SchemaCheckMode):  # type: ignore[no-untyped-call]
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
        self._failed: Exception | None = None
        for key, tensor in tensors.items():
            if tensor not in self._nodes:
                node = self.placeholder(tensor, key.replace(".", "_"))
                self._storages[tensor.untyped_storage()._cdata] = node
            self.keys[self._nodes[tensor].name] = key  # the last of several names, as export has it

    def check(self) -> None:
        """Raises what an operator raised on fake tensors and the network caught: on real ones it might not have."""
        if self._failed is not None and detect_fake_mode() is not None:
            raise self._failed

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
        try:
            arguments = self._with_nodes(args), self._with_nodes(kwargs or {})
            result = func(*args, **kwargs or {})
        except Exception as error:
            self._failed = self._failed or error
            raise
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

    def kept_by(self, model: nn.Module) -> list[fx.Node]:
        """What modules keep, in attributes, of the tensors that calls made."""
        own = {"_parameters", "_buffers", "_modules"}
        kept = [value for each in nn.Module.modules(model) for name, value in vars(each).items() if name not in own]
        nodes = (self._nodes.get(tensor) for tensor in tensors_in(kept))
        return [node for node in nodes if node is not None and node.op == "call_function"]

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that made a tensor."""
        if tensor in self._nodes:
            return self._nodes[tensor]
        stored = tensor.layout is torch.strided and tensor.numel() > 0
        parameter = self._storages.get(tensor.untyped_storage()._cdata) if stored else None
        if parameter is not None:  # such as `weight.data`
            made = self.graph.call_function(torch.ops.aten.alias.default, (parameter,))
        elif _depends_on_fakes(tensor):  # a call was not seen: it may be anything
            raise ValueError("a tensor was made by no operator that was recorded")
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


def _depends_on_fakes(tensor: Tensor) -> bool:
    """Whether it is fake or wraps another (as under `vmap`): a real one among fakes was there before."""
    return isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _shape_of(tensor: Tensor) -> Tensor:
    """A tensor of that shape. To keep `tensor` itself would make torch hand a copy of it to the network."""
    with unset_fake_temporarily():  # a fake one would cost more than the call
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
