"""A network and an example input become a `Graph` of `Op`s: who reads what, with which parameters.

The only file that names `torch.export` or ATen. Tracing runs on fake tensors, so a network can be traced on
the meta device, from its configuration alone; nothing is computed and the network is left as it was.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from equalize.errors import SiteError

__all__ = ["Graph", "Kind", "Op", "trace"]

Kind = Literal[
    "input",  # what the network is called with
    "constant",  # a parameter, buffer or literal used as an activation
    "convolution",  # also transposed; input channels on axis -1 - spatial dimensions
    "linear",  # input channels on the last axis
    "concat",
    "resample",  # interpolation, whatever its factor
    "pixel_shuffle",
    "pool",
    "norm",
    "relu",  # f(c x) = c f(x) for every c > 0: ReLU, LeakyReLU, PReLU
    "activation",  # elementwise in one argument, without that property
    "identity",  # dropout in eval mode, copies, casts
    "pad",
    "crop",  # a slice along one axis
    "permute",
    "reshape",
    "elementwise",  # of several arguments
    "add",
    "other",
    "output",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation of a traced network.

    Attributes:
        name: unique in its graph.
        kind: what it does to scale and channels.
        target: the operator's own name, for messages.
        inputs: names of the ops whose tensors it reads, data first; parameters are not among them.
        shape: of its (first) output.
        module: path of the innermost module that called it, "" for the network itself.
        parameters: role ("weight", "bias", "running_mean", "running_var") to state-dict key. A role whose
            tensor is computed rather than stored maps to None.
        attributes: by kind. convolution: groups, stride, padded, transposed; concat: dim; resample: mode;
            norm: type; pad: zero, mode; permute: order; pixel_shuffle: factor.
    """

    name: str
    kind: Kind
    target: str = ""
    inputs: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    module: str = ""
    parameters: Mapping[str, str | None] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A traced network: its ops in the order they ran, and the shapes of its parameters and buffers."""

    ops: tuple[Op, ...]
    shapes: Mapping[str, tuple[int, ...]]
    tracer: Literal["export", "recorder"] = "export"


def trace(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Graph:
    """Traces `model` in eval mode on inputs shaped like `example`.

    Args:
        model: any module; its mode is restored.
        example: the positional input, such as (N, C, H, W), or a tuple of them; values are not looked at.

    Raises:
        SiteError: if `torch.export` refuses the network, or the network refuses the example.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with _eval_mode(model), _quiet(), torch.no_grad():
        try:
            program = torch.export.export(model, tuple(tensor.to(device) for tensor in inputs), strict=False)
        except Exception as error:  # whatever the network's own code raises on fake tensors
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise SiteError(
                type(model).__name__,
                f"cannot be traced ({type(error).__name__}: {reason.strip()[:200]})",
                got=f"input {' + '.join(str(list(tensor.shape)) for tensor in inputs)}",
                remedy="give an input shape that the network takes (--size, --input-shape)",
            ) from error
    signature = program.graph_signature
    keys = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    plain = frozenset(signature.inputs_to_parameters.values())
    reader = _Reader(keys=keys, plain=plain)
    reader.read(program.graph_module, env={})
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    return Graph(ops=tuple(reader.ops), shapes=shapes)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export's own chatter is no news to someone who asked for a scan."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class _Reader:
    """Turns the nodes of an exported program into `Op`s."""

    def __init__(self, *, keys: Mapping[str, str], plain: frozenset[str]) -> None:
        self.keys = keys
        self.plain = plain
        self.ops: list[Op] = []

    def read(self, module: GraphModule, env: dict[Node, str]) -> None:
        """Appends the ops of `module`; `env` holds the op that now stands for each node's tensor."""
        for node in module.graph.nodes:
            if node.op == "placeholder" and node not in env:
                env[node] = self._append(node, Op(name=node.name, kind="constant" if node.name in self.keys else "input"))
            elif node.op == "get_attr":
                if not isinstance(getattr(module, str(node.target), None), GraphModule):
                    env[node] = self._append(node, Op(name=node.name, kind="constant"))
            elif node.op == "output":
                self.ops.append(Op(name=f"output_{len(self.ops)}", kind="output", inputs=_names(node.args, env)))
            elif node.op == "call_function":
                self._call(module, node, env)

    def _call(self, module: GraphModule, node: Node, env: dict[Node, str]) -> None:
        body = next((arg for arg in node.args if isinstance(arg, Node) and _submodule(module, arg)), None)
        if body is not None:  # a region under no_grad or autocast: read it in place
            self._inline(module, node, body, env)
            return
        if node.target is getattr:
            return
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        if name == "getitem":
            source = node.args[0]
            assert isinstance(source, Node)
            inner = env.get(source)
            if isinstance(inner, str):
                env[node] = self._append(node, Op(name=node.name, kind="other", target="getitem", inputs=(inner,)))
            return
        env[node] = self._append(node, self._convert(name, node, env))
        if name.endswith("_") and not name.endswith("__") and isinstance(node.args[0], Node):
            env[node.args[0]] = env[node]  # in place: whoever reads the argument later, reads the result

    def _inline(self, module: GraphModule, node: Node, body: Node, env: dict[Node, str]) -> None:
        inner = _submodule(module, body)
        assert inner is not None
        arguments = node.args[node.args.index(body) + 1 :]
        placeholders = [each for each in inner.graph.nodes if each.op == "placeholder"]
        inner_env = {
            placeholder: env[argument]
            for placeholder, argument in zip(placeholders, arguments, strict=False)
            if isinstance(argument, Node) and argument in env
        }
        reader = _Reader(
            keys={
                placeholder.name: self.keys[argument.name]
                for placeholder, argument in zip(placeholders, arguments, strict=False)
                if isinstance(argument, Node) and argument.name in self.keys
            },
            plain=self.plain,
        )
        reader.read(inner, inner_env)
        results = reader.ops.pop()
        assert results.kind == "output"
        prefix = f"{node.name}."
        local = {op.name for op in reader.ops}

        def rename(name: str) -> str:
            return prefix + name if name in local else name

        for op in reader.ops:
            self.ops.append(
                Op(
                    name=rename(op.name),
                    kind=op.kind,
                    target=op.target,
                    inputs=tuple(rename(each) for each in op.inputs),
                    shape=op.shape,
                    module=op.module,
                    parameters=op.parameters,
                    attributes=op.attributes,
                )
            )
        for user in list(node.users):  # a region returns a tuple: its getitems are the results themselves
            if getattr(user.target, "__name__", "") == "getitem" and isinstance(user.args[1], int):
                env[user] = rename(results.inputs[user.args[1]])

    def _append(self, node: Node, op: Op) -> str:
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            value = next((each for each in value if isinstance(each, Tensor)), None)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self.ops.append(
            Op(
                name=op.name,
                kind=op.kind,
                target=op.target,
                inputs=op.inputs,
                shape=tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else (),
                module=_module_path(stack[-1][0]) if stack else "",
                parameters=op.parameters,
                attributes=op.attributes,
            )
        )
        return op.name

    def _convert(self, name: str, node: Node, env: Mapping[Node, str]) -> Op:
        kind = KINDS.get(name.removesuffix("_"), "other")
        roles = ROLES.get(kind, {})
        arguments = _arguments(node)
        parameters: dict[str, str | None] = {}
        for role, argument in ((role, arguments.get(argument)) for argument, role in roles.items()):
            if isinstance(argument, Node):
                key = self.keys.get(argument.name)
                parameters[role] = key if key in self.plain or role.startswith("running") else None
        data = {argument: value for argument, value in arguments.items() if argument not in roles}
        return Op(
            name=node.name,
            kind=_refine(kind, name, node, arguments),
            target=name,
            inputs=_names(tuple(data.values()), env),
            parameters=parameters,
            attributes=ATTRIBUTES[kind](name, arguments, node) if kind in ATTRIBUTES else {},
        )


def _module_path(path: str) -> str:
    """Module stack entries say "L['self'].a.b", "a.b" or "" by version; only the path is wanted."""
    return path.removeprefix("L['self']").removeprefix(".")


def _submodule(module: GraphModule, node: Node) -> GraphModule | None:
    inner = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    return inner if isinstance(inner, GraphModule) else None


def _names(arguments: object, env: Mapping[Node, str]) -> tuple[str, ...]:
    """The ops behind every tensor in a nest of arguments, in order."""
    if isinstance(arguments, Node):
        return (env[arguments],) if arguments in env else ()
    if isinstance(arguments, Mapping):
        arguments = tuple(arguments.values())
    if isinstance(arguments, list | tuple):
        return tuple(name for argument in arguments for name in _names(argument, env))
    return ()


def _arguments(node: Node) -> dict[str, Any]:
    """Arguments by their names in the operator's schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(index): argument for index, argument in enumerate(node.args)} | dict(node.kwargs)
    named = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    named |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    ordered = named | dict(node.kwargs)
    return {argument.name: ordered[argument.name] for argument in schema.arguments if argument.name in ordered}


def _refine(kind: Kind, name: str, node: Node, arguments: Mapping[str, Any]) -> Kind:
    """The few cases in which an operator's name alone does not tell."""
    if name.startswith("adaptive_avg_pool") and _is_area_interpolation(node, arguments):
        return "resample"
    if name.startswith("dropout") and arguments.get("train"):
        return "other"
    if kind in {"add", "elementwise"} and not isinstance(arguments.get("other"), Node):
        return "activation"  # one argument is a number: affine in the other, but no plain scale
    return kind


def _is_area_interpolation(node: Node, arguments: Mapping[str, Any]) -> bool:
    """interpolate(mode="area") is adaptive average pooling; a pooling module or global pooling is not meant so."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    owner = str(stack[-1][1]) if stack else ""
    return "AdaptiveAvgPool" not in owner and math.prod(arguments.get("output_size") or [1]) > 1


def _size(node: object) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _convolution(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    padding = arguments.get("padding", 0)
    amounts = padding if isinstance(padding, list | tuple) else [padding]
    kernel = _size(arguments.get("weight"))[2:]
    stride = list(arguments.get("stride") or [1])
    stride = stride * len(kernel) if len(stride) == 1 else stride
    if "transpose" in name:  # at stride 1 the kernel reaches over the border, with padding or without
        padded = any(size > 1 and step == 1 for size, step in zip(kernel, stride, strict=True))
    else:
        padded = any(amount not in (0, "valid") for amount in amounts) and any(size > 1 for size in kernel)
    return {
        "groups": int(arguments.get("groups", 1)),
        "stride": stride,
        "padded": padded,
        "transposed": "transpose" in name,
    }


def _concat(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    dim = int(arguments.get("dim", 0))
    return {"dim": dim % max(len(_size(node)), 1)}


def _resample(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    modes = {"nearest": "nearest", "cubic": "bicubic", "linear": "bilinear"}
    return {"mode": next((mode for part, mode in modes.items() if part in name), "area")}


def _norm(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    return {"type": name.removeprefix("native_").removeprefix("_")}


def _pad(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    mode = str(arguments.get("mode", "constant")) if name == "pad" else name.split("_")[0]
    return {"mode": mode, "zero": mode == "constant" and not arguments.get("value")}


def _permute(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    rank = len(_size(node))
    order = list(range(rank))
    if name == "permute":
        order = [int(dim) % rank for dim in arguments["dims"]]
    elif name == "movedim":
        sources, targets = (
            [int(dim) % rank for dim in (value if isinstance(value, list | tuple) else [value])]
            for value in (arguments["source"], arguments["destination"])
        )
        order = [dim for dim in order if dim not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            order.insert(target, source)
    else:  # transpose, swapaxes, t, mT
        first, second = (arguments.get(key, arguments.get(other)) for key, other in (("dim0", "axis0"), ("dim1", "axis1")))
        a, b = (0, 1) if first is None or second is None else (int(first) % rank, int(second) % rank)
        order[a], order[b] = order[b], order[a]
    return {"order": order}


def _crop(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    return {"dim": int(arguments.get("dim", 0)) % max(len(_size(node)), 1)}


def _shuffle(name: str, arguments: Mapping[str, Any], node: Node) -> dict[str, Any]:
    return {"factor": int(arguments.get("upscale_factor", 1))}


ATTRIBUTES: Mapping[Kind, Callable[[str, Mapping[str, Any], Node], dict[str, Any]]] = {
    "convolution": _convolution,
    "concat": _concat,
    "resample": _resample,
    "pool": _resample,  # for interpolate(mode="area"), which is pooling by name
    "norm": _norm,
    "pad": _pad,
    "permute": _permute,
    "crop": _crop,
    "pixel_shuffle": _shuffle,
}

# The arguments of an operator that are its parameters rather than its data, and the role each plays.
ROLES: Mapping[Kind, Mapping[str, str]] = {
    "convolution": {"weight": "weight", "bias": "bias"},
    "linear": {"weight": "weight", "bias": "bias"},
    "norm": {"weight": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"},
    "relu": {"weight": "weight"},
}


def _kinds(table: Mapping[Kind, Sequence[str]]) -> Mapping[str, Kind]:
    return {name: kind for kind, names in table.items() for name in names}


KINDS: Mapping[str, Kind] = _kinds(
    {
        "convolution": (
            "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d".split()
        ),
        "linear": ["linear"],
        "concat": "cat concat concatenate".split(),
        "resample": (
            "upsample_linear1d upsample_bilinear2d upsample_trilinear3d _upsample_bilinear2d_aa upsample_bicubic2d "
            "_upsample_bicubic2d_aa upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
            "_upsample_nearest_exact2d _upsample_nearest_exact3d"
        ).split(),
        "pixel_shuffle": ["pixel_shuffle"],
        "pool": (
            "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
            "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices "
            "mean"
        ).split(),
        "norm": "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm".split(),
        "relu": "relu leaky_relu prelu".split(),
        "activation": (
            "gelu silu sigmoid tanh hardswish hardsigmoid hardtanh relu6 elu selu celu mish softplus softmax log_softmax "
            "exp log sqrt abs neg clamp clamp_min clamp_max pow square erf"
        ).split(),
        "identity": (
            "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout clone contiguous "
            "detach alias to _to_copy type_as lift_fresh_copy native_dropout positive"
        ).split(),
        "pad": (
            "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
            "replication_pad3d"
        ).split(),
        "crop": "slice narrow".split(),
        "permute": "permute transpose swapaxes swapdims t numpy_T mT movedim".split(),
        "reshape": "view reshape flatten unflatten squeeze unsqueeze _unsafe_view _reshape_copy view_as reshape_as".split(),
        "add": ["add"],
        "elementwise": "mul sub div rsub maximum minimum where addcmul lerp".split(),
    }
)
