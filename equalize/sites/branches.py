"""Walks back from a concat along its branches: how each was resampled, and which parameters set its scale."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from equalize.graph.graph import Graph, Kind, Op

Resampling = Literal[
    "bilinear", "trilinear", "linear", "nearest", "bicubic", "area", "transposed_conv", "pixel_shuffle"
]

# What a branch may pass through between being resampled and being concatenated.
_THROUGH: frozenset[Kind] = frozenset(
    {"identity", "relu", "activation", "elementwise", "add", "norm", "crop", "pad", "permute", "reshape", "concat"}
)
# What commutes with multiplication by a positive number, so that a scale can migrate through it.
_HOMOGENEOUS: frozenset[Kind] = frozenset(
    {"identity", "relu", "pool", "resample", "pixel_shuffle", "crop", "permute", "reshape", "concat"}
)
# What makes its output from one tensor, channel by channel.
_SINGLE: frozenset[Kind] = frozenset(
    {"resample", "pixel_shuffle", "identity", "relu", "activation", "norm", "crop", "pad", "permute", "reshape"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Channels `start` to `stop` of a fusion layer's input.

    Attributes:
        start, stop: half-open range of input channels.
        resampling: how the branch was resampled on its way, None if it was not.
        factor: output size / input size of that resampling, per spatial axis; ones if there was none.
        source: path of the module that made the branch, before resampling.
        producers: state-dict keys whose multiplication by c > 0 multiplies this branch, and nothing else, by c.
        fixed: why there are none, else None.
    """

    start: int
    stop: int
    resampling: Resampling | None
    factor: tuple[float, ...]
    source: str
    producers: tuple[str, ...] = ()
    fixed: str | None = None


def find_branches(graph: Graph, concat: Op, way: Sequence[Op], rank: int) -> Iterator[Branch]:
    """The branches of a concat, in order; `way` leads to the fusion layer, with `rank` spatial axes."""
    shared = next((op.name for op in (concat, *way) if len(graph.consumers[op.name]) != 1), None)
    start = 0
    for leaf, inner in _leaves(graph, concat):
        resample = _find_resampling(graph, leaf)
        producers: list[str] = []
        split = shared or inner
        fixed = f"{place(graph[split])} has a second consumer" if split else _producers(graph, leaf, producers)
        width = leaf.shape[concat.attributes["dim"]]
        yield Branch(
            start=start,
            stop=start + width,
            resampling=resampling_of(resample) if resample else None,
            factor=_factor(graph, resample) if resample else (1.0,) * rank,
            source=_source(graph, resample or leaf),
            producers=() if fixed else tuple(producers),
            fixed=fixed,
        )
        start += width


def _leaves(graph: Graph, concat: Op) -> Iterator[tuple[Op, str | None]]:
    """The tensors of a concat, with the concats among them taken apart.

    With each tensor, the name of an op on its way that others read too, or None.
    """
    for name in concat.inputs:
        leaf = graph[name]
        if leaf.shape == (0,) or leaf.shape[concat.attributes["dim"]] == 0:  # what a loop begins with
            continue
        way = [leaf]
        while way[-1].kind == "identity":
            way.append(graph[way[-1].inputs[0]])
        if way[-1].kind == "concat" and way[-1].attributes["dim"] == concat.attributes["dim"]:
            shared = next((op.name for op in way if len(graph.consumers[op.name]) != 1), None)
            yield from ((inner, further or shared) for inner, further in _leaves(graph, way[-1]))
        else:
            yield leaf, None


def _find_resampling(graph: Graph, leaf: Op) -> Op | None:
    """Walks back from a branch, through nothing that mixes channels or places, to where it was resampled."""
    level, seen = [leaf], {leaf.name}
    while level:
        for op in level:
            if resampling_of(op) and op.name in graph.fed:  # a resampled position embedding is no feature
                return op
        behind = dict.fromkeys(name for op in level if op.kind in _THROUGH for name in op.inputs)
        level = [graph[name] for name in behind if name not in seen]
        seen.update(behind)
    return None


def place(op: Op) -> str:
    """Where an op happens, for messages: its module, or its own name in the network's own forward."""
    return op.module or op.name


def resampling_of(op: Op) -> Resampling | None:
    """How an op resamples, None if it does not."""
    if op.kind == "resample":
        mode: Resampling = op.attributes["mode"]
        return mode
    if op.kind == "convolution" and op.attributes["transposed"] and any(s > 1 for s in op.attributes["stride"]):
        return "transposed_conv"
    return "pixel_shuffle" if op.kind == "pixel_shuffle" else None


def _factor(graph: Graph, op: Op) -> tuple[float, ...]:
    if op.kind == "convolution":
        return tuple(float(stride) for stride in op.attributes["stride"])
    if op.kind == "pixel_shuffle":
        return (float(op.attributes["factor"]),) * 2
    before = graph[op.inputs[0]].shape
    return tuple(out / size for out, size in zip(op.shape[2:], before[2:], strict=True))


def _source(graph: Graph, op: Op) -> str:
    """The module that made a tensor: back from `op` to a layer, a pooling or a mixing of several tensors."""
    while op.kind in _SINGLE and op.inputs:
        op = graph[op.inputs[0]]
    return place(op)


def _producers(graph: Graph, leaf: Op, found: list[str]) -> str | None:
    """Collects the parameters that scale a branch and nothing else; returns the reason if there are none."""
    op = leaf
    while True:
        if len(graph.consumers[op.name]) != 1:
            return f"{place(op)} has a second consumer"
        if op.kind in {"norm", "convolution", "linear"}:
            return _affine(graph, op, found)
        if not scales_through(op):
            return f"{op.target or op.kind} in {place(op)} does not commute with a scale"
        if op.kind == "concat":
            return next(filter(None, [_producers(graph, graph[name], found) for name in op.inputs]), None)
        op = graph[op.inputs[0]]


def scales_through(op: Op) -> bool:
    """Whether an op commutes with multiplication by a positive number."""
    if op.kind == "pad":
        return bool(op.attributes["zero"]) or op.attributes["mode"] != "constant"
    return op.kind in _HOMOGENEOUS


def _affine(graph: Graph, op: Op, found: list[str]) -> str | None:
    weight = op.parameters.get("weight")
    if weight is None:
        return f"{op.target} {place(op)} has no affine parameters of its own"
    keys = [key for role in ("weight", "bias") if (key := op.parameters.get(role)) is not None]
    if op.parameters.get("bias", "") is None:
        return f"the bias of {place(op)} is not a plain parameter"
    shared = next((key for key in keys if graph.uses[key] > 1), None)
    if shared is not None:
        return f"{shared} is used {graph.uses[shared]} times"
    found += keys
    return None
