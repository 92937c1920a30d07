"""From a graph's ops to fusion layers: what can be equalized, and what cannot and why.

A site is a convolution or linear layer whose input channels come from a concat along the axis it sums over.
From each concat we walk forward to the layers that read it, and back along each branch to see how it was
resampled and which parameters set its scale. Pure Python: nothing here knows torch.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

from equalize.graph import Graph, Kind, Op

__all__ = ["Branch", "Refusal", "Resampling", "Site", "find_sites"]

Resampling = Literal["bilinear", "nearest", "bicubic", "area", "transposed_conv", "pixel_shuffle"]
SiteKind = Literal["resampled", "plain"]

# What a branch may pass through between being resampled and being concatenated.
_THROUGH: frozenset[Kind] = frozenset(
    {"identity", "relu", "activation", "elementwise", "add", "norm", "crop", "pad", "permute", "reshape", "concat"}
)
# What commutes with multiplication by a positive number, so that a scale can migrate through it.
_HOMOGENEOUS: frozenset[Kind] = frozenset(
    {"identity", "relu", "pool", "resample", "pixel_shuffle", "crop", "permute", "reshape", "concat"}
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
        count, mean, std: population moments over N, space and the branch's channels, once measured.
        ci95: half width of the 95 % interval of `std`, relative to it; None where one image was seen.
    """

    start: int
    stop: int
    resampling: Resampling | None
    factor: tuple[float, ...]
    source: str
    producers: tuple[str, ...] = ()
    fixed: str | None = None
    count: int | None = None
    mean: float | None = None
    std: float | None = None
    ci95: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A fusion layer and the branches it mixes.

    Attributes:
        layer: module path. weight, bias: state-dict keys. norm: path of the normalisation directly after.
        op: "conv2d", "conv_transpose2d", "linear", ...; kernel: its spatial size, empty for a linear layer.
        axis: of the weight's input channels: 1; 0 for depthwise and transposed convolutions.
        exact_border: whether folded weights equal explicit equalizers on the border too.
        shift: where the means can go: the layer's own bias, the BatchNorm behind it, or nowhere.
        upstream: layers of the sites whose output reaches this one.
        norms: `running_mean` keys of the BatchNorms that this layer's output reaches, in graph order.
        strategy: what a plan chose for it.
    """

    layer: str
    weight: str
    bias: str | None
    norm: str | None
    op: str
    kernel: tuple[int, ...]
    axis: int
    groups: int
    kind: SiteKind
    exact_border: bool
    shift: Literal["bias", "running_mean"] | None
    branches: tuple[Branch, ...]
    upstream: tuple[str, ...] = field(default=(), repr=False)
    norms: tuple[str, ...] = field(default=(), repr=False)
    strategy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A concat that became no site: the module it happens in, and why."""

    at: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One way from a concat to a layer that may sum over its channels."""

    layer: Op
    way: tuple[str, ...]  # ops passed between the two
    scale_only: bool
    zero_padded: bool


def find_sites(graph: Graph) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    """All sites of a network in graph order, resampled and plain, and a refusal for every other concat."""
    network = _Network(graph)
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for concat in graph.ops:
        if concat.kind != "concat":
            continue
        found, reasons = _sites_of(network, concat)
        sites += found
        if reasons:
            refusals.append(Refusal(at=concat.module or concat.name, reason="; ".join(dict.fromkeys(reasons))))
    sites.sort(key=lambda site: network.order[network.layer_of[site.weight]])
    if not sites:
        refusals += _explain_nothing(network, refusals)
    return tuple(network.with_surroundings(sites)), tuple(refusals)


class _Network:
    """A graph with the questions that the walks ask of it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ops: Mapping[str, Op] = {op.name: op for op in graph.ops}
        self.order: Mapping[str, int] = {op.name: index for index, op in enumerate(graph.ops)}
        self.layer_of: dict[str, str] = {}  # weight -> name of the op that reads it

    @cached_property
    def consumers(self) -> Mapping[str, Sequence[Op]]:
        """Who reads each op's tensor; an op that reads it twice stands twice."""
        consumers: dict[str, list[Op]] = {op.name: [] for op in self.graph.ops}
        for op in self.graph.ops:
            for name in op.inputs:
                consumers[name].append(op)
        return consumers

    @cached_property
    def uses(self) -> Counter[str]:
        """How many ops read each parameter."""
        return Counter(key for op in self.graph.ops for key in op.parameters.values() if key is not None)

    def downstream(self, name: str) -> set[str]:
        """Every op that the tensor of `name` reaches."""
        reached: set[str] = set()
        stack = [name]
        while stack:
            for consumer in self.consumers[stack.pop()]:
                if consumer.name not in reached:
                    reached.add(consumer.name)
                    stack.append(consumer.name)
        return reached

    def with_surroundings(self, sites: Sequence[Site]) -> Iterator[Site]:
        """The sites, each with the sites before and the BatchNorms behind it."""
        reached = {site.layer: self.downstream(self.layer_of[site.weight]) for site in sites}
        for site in sites:
            norms = (op.parameters.get("running_mean") for op in self.graph.ops if op.name in reached[site.layer])
            yield replace(
                site,
                upstream=tuple(
                    other.layer for other in sites if self.layer_of[site.weight] in reached[other.layer]
                ),
                norms=tuple(dict.fromkeys(key for key in norms if key is not None)),
            )


def _sites_of(network: _Network, concat: Op) -> tuple[list[Site], list[str]]:
    """The sites that one concat feeds, and why its other readers are none."""
    sites: list[Site] = []
    reasons: list[str] = []
    nested = False
    for found in _readings(network, concat):
        if isinstance(found, str):
            nested = nested or found == _NESTED
            reasons += [found] if found != _NESTED else []
            continue
        reason = _refuse_weight(network, found.layer)
        if reason is None:
            network.layer_of[str(found.layer.parameters["weight"])] = found.layer.name
            sites.append(_site(network, concat, found))
        else:
            reasons.append(reason)
    if not sites and not reasons and not nested:
        reasons.append("nothing reads it")
    return sites, reasons


_NESTED = "part of another concat"


def _readings(network: _Network, concat: Op) -> Iterator[_Reading | str]:
    """Walks forward from a concat: the layers that read it, and a reason for every other end."""
    stack = [(concat, concat.attributes["dim"], (), False, False)]
    seen: set[str] = set()
    while stack:
        op, axis, way, scale_only, zero_padded = stack.pop()
        for consumer in network.consumers[op.name]:
            if consumer.name in seen:
                continue
            seen.add(consumer.name)
            onward = _carry_axis(op, consumer, axis)
            if consumer.kind == "concat":
                yield _NESTED if onward is not None else f"concatenated again along another axis in {_place(consumer)}"
            elif consumer.kind in {"convolution", "linear"}:
                if consumer.inputs[0] != op.name or axis != _summed_axis(network, op, consumer):
                    yield f"concatenated along axis {axis} of {list(op.shape)}, which {_place(consumer)} does not sum over"
                else:
                    yield _Reading(layer=consumer, way=way, scale_only=scale_only, zero_padded=zero_padded)
            elif consumer.kind == "norm":
                yield f"already normalised by {consumer.target} {_place(consumer)}"
            elif consumer.kind == "output":
                yield "returned as an output of the network"
            elif consumer.kind not in _FORWARD or (consumer.kind == "pad" and not _homogeneous_pad(consumer)):
                yield f"its consumer {consumer.target} in {_place(consumer)} is not linear"
            elif onward is None:
                yield f"its channels do not stay whole in {consumer.target} of {_place(consumer)}"
            else:
                scaled = scale_only or consumer.kind in {"relu", "pool"}
                padded = zero_padded or bool(consumer.attributes.get("zero", False))
                stack.append((consumer, onward, (*way, consumer.name), scaled, padded))


# What the channels of a concat may pass through on their way to the fusion layer. A per-channel affine map commutes
# with all of them but ReLU and pooling, with which only its scale does.
_FORWARD: frozenset[Kind] = frozenset({"identity", "resample", "relu", "pool", "pad", "crop", "permute", "reshape"})


def _place(op: Op) -> str:
    return op.module or op.name


def _summed_axis(network: _Network, data: Op, layer: Op) -> int:
    """The axis of `data` that a convolution or linear layer sums over."""
    if layer.kind == "linear":
        return len(data.shape) - 1
    weight = layer.parameters.get("weight")
    spatial = len(network.graph.shapes[weight]) - 2 if weight in network.graph.shapes else len(data.shape) - 2
    return len(data.shape) - 1 - spatial


def _carry_axis(op: Op, consumer: Op, axis: int) -> int | None:
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
    same = len(consumer.shape) == len(op.shape) and consumer.shape[axis] == op.shape[axis]
    return axis if same else None


def _refuse_weight(network: _Network, layer: Op) -> str | None:
    weight = layer.parameters.get("weight")
    if weight is None:
        return f"the weight of {_place(layer)} is not a plain parameter"
    if network.uses[weight] > 1:
        return f"{weight} is used {network.uses[weight]} times"
    bias = layer.parameters.get("bias", "")
    if bias is None:
        return f"the bias of {_place(layer)} is not a plain parameter"
    if bias and network.uses[bias] > 1:
        return f"{bias} is used {network.uses[bias]} times"
    return None


def _site(network: _Network, concat: Op, reading: _Reading) -> Site:
    layer = reading.layer
    weight = str(layer.parameters["weight"])
    shape = network.graph.shapes[weight]
    groups = int(layer.attributes.get("groups", 1))
    transposed = bool(layer.attributes.get("transposed", False))
    bias = layer.parameters.get("bias")
    branches = tuple(_branches(network, concat, reading))
    norm, running_mean = _norm_behind(network, layer)
    phases = transposed and any(stride > 1 for stride in layer.attributes["stride"])
    shift: Literal["bias", "running_mean"] | None = None
    if not reading.scale_only and not phases:  # a strided transposed kernel spreads a mean unevenly
        shift = "bias" if bias else "running_mean" if running_mean else None
    return Site(
        layer=weight.rpartition(".")[0] or weight,
        weight=weight,
        bias=bias or None,
        norm=norm,
        op=layer.target.removesuffix("_"),
        kernel=shape[2:],
        axis=0 if transposed or (groups > 1 and shape[1] == 1) else 1,
        groups=groups,
        kind="resampled" if any(branch.resampling for branch in branches) else "plain",
        exact_border=not (layer.attributes.get("padded", False) or reading.zero_padded),
        shift=shift,
        branches=branches,
    )


def _norm_behind(network: _Network, layer: Op) -> tuple[str | None, str | None]:
    """The normalisation that alone reads the layer's output: its module and its running_mean."""
    readers = network.consumers[layer.name]
    if len(readers) != 1 or readers[0].kind != "norm":
        return None, None
    running_mean = readers[0].parameters.get("running_mean")
    return readers[0].module, running_mean


def _branches(network: _Network, concat: Op, reading: _Reading) -> Iterator[Branch]:
    shared = next((name for name in (concat.name, *reading.way) if len(network.consumers[name]) != 1), None)
    start = 0
    for leaf in _leaves(network, concat):
        resample = _find_resampling(network, leaf)
        producers: list[str] = []
        fixed = f"{_place(network.ops[shared])} has a second consumer" if shared else _producers(network, leaf, producers)
        width = leaf.shape[concat.attributes["dim"]]
        yield Branch(
            start=start,
            stop=start + width,
            resampling=_resampling(resample) if resample else None,
            factor=_factor(network, resample) if resample else (1.0,) * (len(leaf.shape) - 2),
            source=_source(network, resample or leaf),
            producers=() if fixed else tuple(producers),
            fixed=fixed,
        )
        start += width


def _leaves(network: _Network, concat: Op) -> Iterator[Op]:
    """The tensors of a concat, with the concats among them taken apart."""
    for name in concat.inputs:
        leaf = network.ops[name]
        inner = leaf
        while inner.kind == "identity":
            inner = network.ops[inner.inputs[0]]
        if inner.kind == "concat" and inner.attributes["dim"] == concat.attributes["dim"]:
            yield from _leaves(network, inner)
        else:
            yield leaf


def _find_resampling(network: _Network, leaf: Op) -> Op | None:
    """Walks back from a branch, through nothing that mixes channels or places, to where it was resampled."""
    level, seen = [leaf], {leaf.name}
    while level:
        for op in level:
            if _resampling(op):
                return op
        behind = [network.ops[name] for op in level if op.kind in _THROUGH for name in op.inputs]
        level = [network.ops[name] for name in dict.fromkeys(op.name for op in behind) if name not in seen]
        seen |= {op.name for op in level}
    return None


def _resampling(op: Op) -> Resampling | None:
    if op.kind == "resample":
        mode = op.attributes["mode"]
        return next(each for each in get_args(Resampling) if each == mode)  # type: ignore[no-any-return]
    if op.kind == "convolution" and op.attributes["transposed"] and any(s > 1 for s in op.attributes["stride"]):
        return "transposed_conv"
    return "pixel_shuffle" if op.kind == "pixel_shuffle" else None


def _factor(network: _Network, op: Op) -> tuple[float, ...]:
    if op.kind == "convolution":
        return tuple(float(stride) for stride in op.attributes["stride"])
    if op.kind == "pixel_shuffle":
        return (float(op.attributes["factor"]),) * 2
    before = network.ops[op.inputs[0]].shape
    return tuple(out / size for out, size in zip(op.shape[2:], before[2:], strict=True))


def _source(network: _Network, op: Op) -> str:
    """The module that made a tensor: back from `op` to a layer, a pooling or a mixing of several tensors."""
    passing = {"resample", "pixel_shuffle", "identity", "relu", "activation", "norm", "crop", "pad", "permute", "reshape"}
    while op.kind in passing and op.inputs:
        op = network.ops[op.inputs[0]]
    return _place(op)


def _producers(network: _Network, leaf: Op, found: list[str]) -> str | None:
    """Collects the parameters that scale a branch and nothing else; the reason if there are none (DESIGN, `migrate`)."""
    op = leaf
    while True:
        if len(network.consumers[op.name]) != 1:
            return f"{_place(op)} has a second consumer"
        if op.kind in {"norm", "convolution", "linear"}:
            return _affine(network, op, found)
        if op.kind not in _HOMOGENEOUS and not (op.kind == "pad" and _homogeneous_pad(op)):
            return f"{op.target or op.kind} in {_place(op)} does not commute with a scale"
        if op.kind == "concat":
            return next(filter(None, [_producers(network, network.ops[name], found) for name in op.inputs]), None)
        op = network.ops[op.inputs[0]]


def _homogeneous_pad(op: Op) -> bool:
    return bool(op.attributes["zero"]) or op.attributes["mode"] != "constant"


def _affine(network: _Network, op: Op, found: list[str]) -> str | None:
    weight = op.parameters.get("weight")
    if weight is None:
        return f"{op.target} {_place(op)} has no affine parameters of its own"
    keys = [key for role in ("weight", "bias") if (key := op.parameters.get(role)) is not None]
    if op.parameters.get("bias", "") is None:
        return f"the bias of {_place(op)} is not a plain parameter"
    shared = next((key for key in keys if network.uses[key] > 1), None)
    if shared is not None:
        return f"{shared} is used {network.uses[shared]} times"
    found += keys
    return None


def _explain_nothing(network: _Network, refusals: Sequence[Refusal]) -> Iterator[Refusal]:
    """Why a network without sites has none, where no refused concat says it."""
    additions = [
        op
        for op in network.graph.ops
        if op.kind == "add" and any(_is_resampled(network, network.ops[name]) for name in op.inputs)
    ]
    for op in additions:
        yield Refusal(at=_place(op), reason="fuses by addition: no fusion weights stand behind the branches")
    if not additions and not refusals:
        yield Refusal(at="model", reason="has no concat of features")


def _is_resampled(network: _Network, op: Op) -> bool:
    while op.kind == "identity":
        op = network.ops[op.inputs[0]]
    return _resampling(op) is not None
