"""Walks forward from a tensor, along its channels, to the layers that read it. Pure Python."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from equalize.graph.graph import Graph, Kind, Op

# What commutes with multiplication by a positive number, so that a scale can migrate through it.
_HOMOGENEOUS: frozenset[Kind] = frozenset(
    {"identity", "relu", "pool", "resample", "pixel_shuffle", "crop", "permute", "reshape", "concat", "written"}
)

_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "native_dropout"})

# What is linear in the first of its inputs alone.
_ASIDE: frozenset[Kind] = frozenset({"convolution", "linear", "norm", "relu", "written"})

_ELSEWHERE = "this branch feeds another layer too"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A layer, by the key of its weight, and its input channels `start` to `stop`; `axis`, `groups` as in an edit."""

    weight: str
    axis: int
    groups: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Channels:
    """Entries `start` to `stop` on an axis of a tensor."""

    axis: int
    start: int
    stop: int


def place(op: Op) -> str:
    """Where an op happens, for messages: its module, or its own name in the network's own forward."""
    return op.module or op.name


def scales_through(op: Op) -> bool:
    """Whether an op commutes with multiplication by a positive number."""
    if op.target.rstrip("_") in _DROPOUTS:  # also in training
        return True
    if op.kind == "pad":
        return bool(op.attributes["zero"]) or op.attributes["mode"] != "constant"
    return op.kind in _HOMOGENEOUS


def gated(graph: Graph, op: Op) -> frozenset[str]:
    """Those of an op's inputs that it multiplies by weights for channels or places, such as an attention's."""
    if op.kind != "elementwise" or op.target.rstrip("_") != "mul":
        return frozenset()
    spread = {name: graph[name].inputs[0] for name in op.inputs if graph[name].target.startswith("expand")}
    size = math.prod(op.shape)
    whole = {name for name in op.inputs if math.prod(graph[spread.get(name, name)].shape) == size}
    return frozenset(whole) if whole != set(op.inputs) else frozenset()


def find_readers(graph: Graph, made: Op) -> Iterator[Reader | str]:
    """Where the tensor of `made` goes, through ops that commute with a positive scale.

    Yields:
        the layers that read it, so that dividing their weights undoes a scale; for every other end, a clause on it.
    """
    stack: list[tuple[Op, _Channels | None]] = [(made, None)]  # None: all of the tensor
    seen: set[tuple[str, _Channels | None]] = set()
    while stack:
        op, channels = stack.pop()
        for consumer in {each.name: each for each in graph.consumers[op.name]}.values():
            if consumer.kind in _ASIDE and op.name in consumer.inputs[1:]:
                what = "which writes it to a part" if consumer.kind == "written" else "whose weight it is"
                yield f"{_ELSEWHERE}: {place(consumer)}, {what}"
                continue
            if consumer.kind in {"convolution", "linear"}:
                yield _reader(graph, op, consumer, channels)
                continue
            onward = _carry(graph, op, consumer, channels)
            if isinstance(onward, str):
                yield onward
                continue
            ways = [(consumer, each) for each in onward if (consumer.name, each) not in seen]
            stack += ways
            seen.update((consumer.name, each) for _, each in ways)


def _carry(graph: Graph, op: Op, consumer: Op, channels: _Channels | None) -> list[_Channels | None] | str:
    """Where entries of `op`'s tensor stand in `consumer`'s, or why a scale of theirs does not get through it."""
    what = f"{consumer.target or consumer.kind} in {place(consumer)}"
    if consumer.kind == "output":
        return "this branch is an output of the network too"
    if consumer.kind == "norm":
        return f"{_ELSEWHERE}: {what}, which normalizes it"
    if not scales_through(consumer):
        return f"{_ELSEWHERE}: {what}, which does not pass a change of scale on"
    axis = None if channels is None else carry_axis(op, consumer, channels.axis)
    if channels is not None and axis is None:
        return f"{_ELSEWHERE}: {what}, which does not keep its channels apart"
    if consumer.kind != "concat":
        return [None if channels is None or axis is None else replace(channels, axis=axis)]
    dim, start = consumer.attributes["dim"], 0
    found: list[_Channels | None] = []
    for name in consumer.inputs:
        width = graph[name].shape[dim]
        if name == op.name:
            first, last = (0, width) if channels is None else (channels.start, channels.stop)
            found.append(_Channels(axis=dim, start=start + first, stop=start + last))
        start += width
    return found


def _reader(graph: Graph, data: Op, layer: Op, channels: _Channels | None) -> Reader | str:
    weight = layer.parameters.get("weight")
    if weight is None:
        return f"{_ELSEWHERE}: {place(layer)}, whose weight is not a plain parameter"
    if graph.uses[weight] > 1:
        return f"{_ELSEWHERE}: {place(layer)}, whose weight is used {graph.uses[weight]} times"
    axis = summed_axis(graph, data, layer)
    if channels is not None and channels.axis != axis:
        return f"{_ELSEWHERE}: {place(layer)}, which does not sum over its channels"
    whole = _Channels(axis=axis, start=0, stop=data.shape[axis])
    start, stop = (whole.start, whole.stop) if channels is None else (channels.start, channels.stop)
    groups = 1 if layer.attributes.get("transposed") else int(layer.attributes.get("groups", 1))
    return Reader(weight=weight, axis=weight_axis(graph, layer), groups=groups, start=start, stop=stop)


def all_readers(graph: Graph, made: Iterable[Op]) -> tuple[Reader, ...] | str:
    """The layers that read any of these tensors, see `find_readers`, or a clause on an end that is none."""
    found = [each for op in made for each in find_readers(graph, op)]
    end = next((each for each in found if isinstance(each, str)), None)
    return end or _merged(each for each in found if isinstance(each, Reader))


def _merged(readers: Iterable[Reader]) -> tuple[Reader, ...]:
    """The readers, adjacent channels of one layer as one."""
    found: list[Reader] = []
    for reader in sorted(readers, key=lambda each: (each.weight, each.start)):
        if found and found[-1].weight == reader.weight and found[-1].stop == reader.start:
            found[-1] = replace(found[-1], stop=reader.stop)
        else:
            found.append(reader)
    return tuple(found)


def summed_axis(graph: Graph, data: Op, layer: Op) -> int:
    """The axis of `data` that a convolution or linear layer sums over."""
    if layer.kind == "linear":
        return len(data.shape) - 1
    weight = layer.parameters.get("weight")
    spatial = len(graph.shapes[weight] if weight else data.shape) - 2
    return len(data.shape) - 1 - spatial


def weight_axis(graph: Graph, layer: Op) -> int:
    """The axis of a layer's weight that its input channels are on: 1; 0 for depthwise and transposed convolutions."""
    depthwise = layer.attributes.get("groups", 1) > 1 and graph.shapes[str(layer.parameters["weight"])][1] == 1
    return 0 if layer.attributes.get("transposed") or depthwise else 1


def carry_axis(op: Op, consumer: Op, axis: int) -> int | None:
    """Where `axis` of `op`'s tensor stands in `consumer`'s, or None if its entries do not stay whole and in order."""
    if consumer.kind == "permute":
        return list(consumer.attributes["order"]).index(axis)
    if consumer.kind == "reshape":
        before, size = math.prod(op.shape[:axis]), op.shape[axis]
        places = (
            place
            for place, length in enumerate(consumer.shape)
            if length == size and math.prod(consumer.shape[:place]) == before
        )
        return next(places, None)
    if consumer.kind == "concat":
        return axis if consumer.attributes["dim"] == axis else None
    dropped: tuple[int, ...] = consumer.attributes.get("dropped", ())
    if dropped:
        return None if axis in dropped else axis - sum(dim < axis for dim in dropped)
    same = len(consumer.shape) == len(op.shape) and consumer.shape[axis] == op.shape[axis]
    return axis if same else None
