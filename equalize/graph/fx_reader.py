"""Converts the nodes of an fx graph of ATen calls, exported or recorded, to the `Op`s of a `Graph`."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from equalize.graph.aten import ATTRIBUTES, ROLES, kind_of, module_of, named_arguments, shape_of
from equalize.graph.graph import Op


def read_ops(graph: FxGraph, owner: nn.Module, *, keys: Mapping[str, str], plain: frozenset[str]) -> tuple[Op, ...]:
    """The ops of a graph whose nodes carry a tensor under "val" and their modules under "nn_module_stack", in order.

    Args:
        owner: holds the subgraphs that the graph's `get_attr` nodes name.
        keys: state-dict keys of the placeholders that stand for parameters and buffers; `plain` are parameters.
    """
    reader = _Reader(keys, plain)
    reader.read(graph, owner, env={})
    return tuple(reader.ops)


class _Reader:
    """Turns the nodes of a graph into `Op`s; `prefix` stands before their names."""

    def __init__(self, keys: Mapping[str, str], plain: frozenset[str], prefix: str = "") -> None:
        self.keys = keys
        self.plain = plain
        self.prefix = prefix
        self.ops: list[Op] = []
        self.places: dict[str, int] = {}
        self.bases: dict[str, str] = {}  # of views: the op that made the memory which they share
        self.writes: dict[str, str] = {}  # by base: the last op that wrote into that memory

    def read(self, graph: FxGraph, module: nn.Module, env: dict[Node, str]) -> None:
        """Appends the ops of `graph`; `env` holds the op that now stands for each node's tensor."""
        for node in graph.nodes:
            if node.op == "placeholder" and node not in env:
                key = self.keys.get(node.name)
                op = Op(name=node.name, kind="input")
                constant = Op(name=node.name, kind="constant", attributes={"key": key})
                env[node] = self._append(node, op if key is None else constant)
            elif node.op == "get_attr":
                if not isinstance(getattr(module, str(node.target), None), GraphModule):
                    env[node] = self._append(node, Op(name=node.name, kind="constant"))
            elif node.op == "output":
                self.ops.append(Op(name=f"output_{len(self.ops)}", kind="output", inputs=self._names(node.args, env)))
            elif node.op == "call_function":
                self._call(module, node, env)

    def _call(self, module: nn.Module, node: Node, env: dict[Node, str]) -> None:
        body = next((arg for arg in node.args if isinstance(arg, Node) and _submodule(module, arg)), None)
        if body is not None:  # a region under no_grad or autocast: read it in place
            self._inline(module, node, body, env)
            return
        name = _name(node)
        if node.target is getattr or name.startswith("_assert"):  # a check makes nothing and changes nothing
            return
        first = node.args[0] if node.args else None
        if name in _SPLITS and isinstance(first, Node):
            env[node] = self._current(first, env)  # only its parts are ops
        elif name == "getitem":
            assert isinstance(first, Node)
            if first in env and node.users:
                env[node] = self._append(node, _part(node, first, self._current(first, env)))
                self.bases[env[node]] = self._base(env[first])
        elif name != "stack" or _flattened(node) is None:
            env[node] = self._append(node, self._joined(node, env) or self._convert(name, node, env))
            self._keep_memory(node, env)

    def _inline(self, module: nn.Module, node: Node, body: Node, env: dict[Node, str]) -> None:
        inner = _submodule(module, body)
        assert inner is not None
        placeholders = [each for each in inner.graph.nodes if each.op == "placeholder"]
        given = list(zip(placeholders, node.args[node.args.index(body) + 1 :], strict=False))
        tensors = [(placeholder, argument) for placeholder, argument in given if isinstance(argument, Node)]
        keys = {placeholder.name: self.keys[each.name] for placeholder, each in tensors if each.name in self.keys}
        reader = _Reader(keys, self.plain, f"{self.prefix}{node.name}.")
        reader.read(
            inner.graph, inner, {placeholder: self._current(each, env) for placeholder, each in tensors if each in env}
        )
        results = reader.ops.pop()
        assert results.kind == "output"
        self.ops += reader.ops
        for user in list(node.users):  # a region returns a tuple: its getitems are the results themselves
            if getattr(user.target, "__name__", "") == "getitem" and isinstance(user.args[1], int):
                env[user] = results.inputs[user.args[1]]

    def _append(self, node: Node, op: Op) -> str:
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            value = next((each for each in value if isinstance(each, Tensor)), None)
        shape = tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()
        self.ops.append(replace(op, name=self.prefix + op.name, shape=shape, module=module_of(node)[0]))
        self.places[self.ops[-1].name] = len(self.ops)
        return self.ops[-1].name

    def _base(self, name: str) -> str:
        return self.bases.get(name, name)

    def _keep_memory(self, node: Node, env: Mapping[Node, str]) -> None:
        """Notes which memory the tensor of a call is a view of, and which one the call writes into."""
        schema = getattr(node.target, "_schema", None)
        first = node.args[0] if node.args else None
        if schema is None:
            return
        if isinstance(first, Node) and first in env and any(each.alias_info is not None for each in schema.returns):
            self.bases[env[node]] = self._base(env[first])
        given = named_arguments(node)
        for argument in schema.arguments:
            tensor = given.get(argument.name)
            if argument.is_write and isinstance(tensor, Node) and tensor in env:
                self.writes[self._base(env[tensor])] = env[node]

    def _current(self, node: Node, env: dict[Node, str]) -> str:
        """The op that stands for a tensor now: one of its own once its memory was written through another view."""
        name = env[node]
        base = self._base(name)
        write = self.writes.get(base)
        if write is not None and self.places[write] > self.places.get(name, 0):
            op = Op(name=f"written_{len(self.ops)}", kind="written", target="a write to a part", inputs=(name, write))
            env[node] = self._append(node, op)
            self.bases[env[node]] = base
        return env[node]

    def _names(self, arguments: object, env: dict[Node, str]) -> tuple[str, ...]:
        """The ops behind every tensor in a nest of arguments, in order."""
        if isinstance(arguments, Node):
            return (self._current(arguments, env),) if arguments in env else ()
        if isinstance(arguments, Mapping):
            arguments = tuple(arguments.values())
        if isinstance(arguments, list | tuple):
            return tuple(name for argument in arguments for name in self._names(argument, env))
        return ()

    def _joined(self, node: Node, env: dict[Node, str]) -> Op | None:
        """The flattening of a stack as a concat op."""
        stack = node.args[0] if node.args else None
        if not isinstance(stack, Node) or _name(stack) != "stack" or _flattened(stack) is not node:
            return None
        inputs = self._names(stack.args[0], env)
        return Op(name=node.name, kind="concat", target="stack", inputs=inputs, attributes={"dim": _stacked_dim(stack)})

    def _convert(self, name: str, node: Node, env: dict[Node, str]) -> Op:
        arguments = named_arguments(node)
        kind = kind_of(name, node, arguments)
        if kind == "concat":  # loops begin with an empty tensor, and smp has one where an encoder lacks a level
            parts = arguments["tensors"]
            arguments["tensors"] = [each for each in parts if not _is_empty(shape_of(each))] or parts[:1]
            kind = "concat" if len(arguments["tensors"]) > 1 else "identity"
        if kind == "linear" and self._projects_for_attention(node, arguments):
            kind, name = "other", "multi_head_attention"
        roles = ROLES.get(kind, {})
        parameters: dict[str, str | None] = {}
        for role, argument in ((role, arguments.get(argument)) for argument, role in roles.items()):
            if isinstance(argument, Node):
                key = self.keys.get(argument.name)
                parameters[role] = key if key in self.plain or role.startswith("running") else None
        left_out = {"out"} | {argument for argument, role in roles.items() if parameters.get(role) is not None}
        left_out |= {"other"} if kind in {"identity", "reshape", "resample"} else set()  # `view_as` reads a shape
        data = {argument: value for argument, value in arguments.items() if argument not in left_out}
        return Op(
            name=node.name,
            kind=kind,
            target=name,
            inputs=self._names(tuple(data.values()), env),
            parameters=parameters,
            attributes=ATTRIBUTES[kind](name, arguments, node) if kind in ATTRIBUTES else {},
        )

    def _projects_for_attention(self, node: Node, arguments: Mapping[str, Any]) -> bool:
        """Whether a linear call is one that torch makes within its own attention: no call of a layer is seen there."""
        weight = arguments.get("weight")
        key = str(self.keys.get(weight.name)) if isinstance(weight, Node) else ""
        return "MultiheadAttention" in module_of(node)[1] and not key.endswith("out_proj.weight")


# Operators that give slices of their first argument.
_SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split"})


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _part(node: Node, source: Node, made: str) -> Op:
    """One tensor of an operator's several, where op `made` stands for all of them or for what is split."""
    name = _name(source)
    if kind_of(name, source, {}) == "pool" and node.args[1] == 0:  # max pooling returns values and indices
        return Op(name=node.name, kind="identity", target=name, inputs=(made,))
    if name not in _SPLITS:
        return Op(name=node.name, kind="other", target="getitem", inputs=(made,))
    dim = int(named_arguments(source).get("dim", 0)) % max(len(shape_of(node)), 1)
    return Op(name=node.name, kind="crop", target=name, inputs=(made,), attributes={"dim": dim})


def _flattened(stack: Node) -> Node | None:
    """The one reader of a stack, if it flattens the new axis and the next into one: together they concatenate."""
    reader = next(iter(stack.users), None)
    if reader is None or len(stack.users) > 1 or kind_of(_name(reader), reader, {}) != "reshape":
        return None
    shape, dim = shape_of(stack), _stacked_dim(stack)
    joined = (*shape[:dim], math.prod(shape[dim : dim + 2]), *shape[dim + 2 :])
    return reader if len(shape) > dim + 1 and shape_of(reader) == joined else None


def _stacked_dim(stack: Node) -> int:
    return int(named_arguments(stack).get("dim", 0)) % len(shape_of(stack))


def _submodule(module: nn.Module, node: Node) -> GraphModule | None:
    inner = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    return inner if isinstance(inner, GraphModule) else None


def _is_empty(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape adds nothing to a concat, however many images there are."""
    return shape == (0,) or 0 in shape[1:]
