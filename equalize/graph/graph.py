"""`Graph` and `Op`: the operations of a network, their inputs and parameters. Pure Python, no tensors."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

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
    "written",  # a tensor after a write through a view of it: the tensor as it was, and the write
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
        inputs: names of the ops whose tensors it reads, data first, a computed weight or bias among them; parameters
            are not.
        shape: of its (first) output.
        module: path of the innermost module that called it, "" for the network itself.
        parameters: role ("weight", "bias", "running_mean", "running_var") to state-dict key. A role whose
            tensor is computed rather than stored maps to None.
        attributes: by kind. convolution: groups, stride, padded, transposed; concat: dim; resample: mode;
            pool: dropped, the axes it takes away; norm: per_channel, whether it takes out the mean of each channel;
            pad: zero, mode; permute: order; pixel_shuffle: factor; constant: key, if it has one.
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
class Training:
    """What a network does in training.

    Attributes:
        graphs: of passes in which its code sees training mode; none where it cannot be traced so.
        uncalled: how many channels layers take whose weights no traced pass reads, that of inference included, by key.
    """

    graphs: "tuple[Graph, ...]"
    uncalled: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A traced network.

    Attributes:
        ops: in the order they ran.
        shapes: of its parameters and buffers, by key.
        tracer: how it was read.
        ran: whether it had to be run on values, which may have decided what is in it.
    """

    ops: tuple[Op, ...]
    shapes: Mapping[str, tuple[int, ...]]
    tracer: Literal["export", "recorder"] = "export"
    ran: bool = False

    def __getitem__(self, name: str) -> Op:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> Mapping[str, Op]:
        return {op.name: op for op in self.ops}

    @cached_property
    def consumers(self) -> Mapping[str, Sequence[Op]]:
        """The ops that read each op's tensor; an op that reads it twice is listed twice."""
        consumers: dict[str, list[Op]] = {op.name: [] for op in self.ops}
        for op in self.ops:
            for name in op.inputs:
                consumers[name].append(op)
        return consumers

    @cached_property
    def uses(self) -> Counter[str]:
        """How many ops read each parameter, as a parameter or as data."""
        uses = Counter(key for op in self.ops for key in op.parameters.values() if key is not None)
        for op in self.ops:
            if "key" in op.attributes:
                uses[op.attributes["key"]] += len(self.consumers[op.name])
        return uses

    @cached_property
    def readers(self) -> Mapping[str, Op]:
        """The (last) op that reads each parameter."""
        return {key: op for op in self.ops for key in op.parameters.values() if key is not None}

    @cached_property
    def fed(self) -> frozenset[str]:
        """The ops whose tensors depend on the network's input."""
        fed: set[str] = set()
        for op in self.ops:
            if op.kind == "input" or any(name in fed for name in op.inputs):
                fed.add(op.name)
        return frozenset(fed)

    @cached_property
    def norms_before(self) -> Mapping[str, frozenset[str]]:
        """For each `running_mean`, those of the BatchNorms whose output reaches that one."""
        keys = {op.name: key for op in self.ops if (key := op.parameters.get("running_mean")) is not None}
        upstream = self.upstream(keys)
        before: dict[str, frozenset[str]] = {}
        for name, key in keys.items():
            before[key] = before.get(key, frozenset()) | {keys[each] for each in upstream[name]}
        return before

    def upstream(self, of: Container[str]) -> Mapping[str, frozenset[str]]:
        """For each op, those among `of` whose tensors reach it."""
        found: dict[str, frozenset[str]] = {}
        for op in self.ops:
            inputs = frozenset(name for name in op.inputs if name in of)
            found[op.name] = inputs.union(*(found[name] for name in op.inputs))
        return found
