"""Walks back from a concat along its branches: how each was resampled, what sets its scale and
what else reads it."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from equalize.graph.graph import Graph, Kind, Op
from equalize.sites.readers import Reader, all_readers, place, scales_through

Resampling = Literal[
    "bilinear", "trilinear", "linear", "nearest", "bicubic", "area", "transposed_conv", "pixel_shuffle"
]

# What passes its numbers on as they are.
_UNCHANGED: frozenset[Kind] = frozenset({"identity", "permute", "reshape"})
# What makes its output from one tensor, channel by channel.
_SINGLE: frozenset[Kind] = _UNCHANGED | {
    "resample",
    "pixel_shuffle",
    "relu",
    "activation",
    "norm",
    "crop",
    "pad",
    "written",
}
# What a branch may pass through between being resampled and being concatenated.
_THROUGH: frozenset[Kind] = (_SINGLE - {"resample", "pixel_shuffle"}) | {"elementwise", "add", "concat"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Channels `start` to `stop` of a fusion layer's input.

    Attributes:
        start, stop: half-open range of input channels.
        resampling: how the branch was resampled on its way, None if it was not.
        factor: output size / input size of that resampling, per spatial axis; ones if there was none.
        source: path of the module that made the branch, before resampling.
        producers: state-dict keys whose multiplication by c > 0 multiplies this branch by c, and further only what
            `readers` read.
        readers: other layers that read it, whose weights are divided by c where it is multiplied.
        fixed: why there are no producers, else None.
        tensor: name of what the layer reads; layers with the same name here read the same numbers.
    """

    start: int
    stop: int
    resampling: Resampling | None
    factor: tuple[float, ...]
    source: str
    producers: tuple[str, ...] = ()
    readers: tuple[Reader, ...] = ()
    fixed: str | None = None
    tensor: str = field(default="", compare=False, repr=False)

    @property
    def resampled(self) -> str:
        """Such as `bilinear x2`; empty where it was not."""
        if self.resampling is None:
            return ""
        factors = [f"{factor:.3g}" for factor in self.factor]
        return f"{self.resampling} x{factors[0] if len(set(factors)) == 1 else 'x'.join(factors)}"


def find_branches(graph: Graph, concat: Op, way: Sequence[Op], weight: str, rank: int) -> Iterator[Branch]:
    """The branches of a concat, in order; `way` leads to the layer with this weight, with `rank` spatial axes."""
    through = [op.name for op in way if op.kind not in _UNCHANGED]
    gate = next((op for op in way if not scales_through(op)), None)
    start = 0
    for leaf in _leaves(graph, concat):
        resample = _find_resampling(graph, leaf)
        stop = start + leaf.shape[concat.attributes["dim"]]
        movement = _stays(gate, "goes through") if gate else _movement(graph, leaf, weight, start, stop)
        yield Branch(
            start=start,
            stop=stop,
            resampling=resampling_of(resample) if resample else None,
            factor=_factor(graph, resample) if resample else (1.0,) * rank,
            source=_source(graph, resample or leaf),
            **({"fixed": movement} if isinstance(movement, str) else movement),
            tensor=" ".join((_unchanged(graph, leaf).name, *through)),
        )
        start = stop


def any_resampled(graph: Graph, concat: Op) -> bool:
    """Whether any of a concat's tensors was resampled."""
    return any(_find_resampling(graph, leaf) for leaf in _leaves(graph, concat))


def _leaves(graph: Graph, concat: Op) -> Iterator[Op]:
    """The tensors of a concat, with the concats among them taken apart."""
    for name in concat.inputs:
        leaf = graph[name]
        inner = _unchanged(graph, leaf, {"identity"})
        if inner.kind == "concat" and inner.attributes["dim"] == concat.attributes["dim"]:
            yield from _leaves(graph, inner)
        else:
            yield leaf


def _unchanged(graph: Graph, op: Op, kinds: Container[Kind] = _UNCHANGED) -> Op:
    """The op whose numbers `op` passes on."""
    while op.kind in kinds and op.inputs:
        op = graph[op.inputs[0]]
    return op


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


def _stays(op: Op, how: str) -> str:
    return f"it {how} {op.target or op.kind} in {place(op)}, which does not pass a change of scale on"


def _movement(graph: Graph, leaf: Op, weight: str, start: int, stop: int) -> dict[str, Any] | str:
    """The producers and readers of a branch that reaches these channels of a layer, or why it cannot move."""
    made: dict[str, Op] = {}
    reason = _find_producers(graph, leaf, made)
    if reason is not None:
        return reason
    readers = all_readers(graph, made.values())
    if isinstance(readers, str):
        return readers
    if [(each.start, each.stop) for each in readers if each.weight == weight] != [(start, stop)]:
        return f"this branch feeds {weight.removesuffix('.weight')} a second time, as another branch"
    keys = [key for op in made.values() for key in _affine_keys(op)]
    return {"producers": tuple(keys), "readers": tuple(each for each in readers if each.weight != weight)}


def _find_producers(graph: Graph, leaf: Op, found: dict[str, Op]) -> str | None:
    """Collects the affine ops that make a branch, by name; returns the reason if there are none."""
    op = leaf
    while True:
        if op.kind in {"norm", "convolution", "linear"}:
            found[op.name] = op
            return _refuse_affine(graph, op)
        if not scales_through(op):
            return _stays(op, "comes from")
        if op.kind == "concat":
            return next(filter(None, [_find_producers(graph, graph[name], found) for name in op.inputs]), None)
        op = graph[op.inputs[0]]


def _affine_keys(op: Op) -> list[str]:
    return [key for role in ("weight", "bias") if (key := op.parameters.get(role)) is not None]


def _refuse_affine(graph: Graph, op: Op) -> str | None:
    if op.parameters.get("weight") is None:
        return f"it comes from {op.target} {place(op)}, which has no weight and bias of its own"
    if op.parameters.get("bias", "") is None:
        return f"the bias of {place(op)} is not a plain parameter"
    shared = next((key for key in _affine_keys(op) if graph.uses[key] > 1), None)
    return None if shared is None else f"{shared} is used {graph.uses[shared]} times"
