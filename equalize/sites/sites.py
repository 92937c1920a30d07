"""From a graph's ops to fusion layers: what can be equalized, and what cannot and why.

A site is a convolution or linear layer whose input channels come from a concat along the axis it sums over.
From each concat we walk forward to the layers that read it; `branches.py` walks back. Pure Python.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from equalize.graph.graph import Graph, Kind, Op
from equalize.sites.branches import Branch, any_resampled, find_branches
from equalize.sites.readers import carry_axis, gated, place, scales_through, summed_axis, weight_axis
from equalize.sites.refusals import Refusal, explain_nothing

SiteKind = Literal["resampled", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A fusion layer and the branches it mixes.

    Attributes:
        layer: module path; the weight's key where a module keeps it under another name than "weight".
        weight, bias: state-dict keys. norm: path of the normalization that alone reads the layer's output.
        op: "conv2d", "conv_transpose2d", "linear", ...; kernel: its spatial size, empty for a linear layer.
        axis: of the weight's input channels: 1; 0 for depthwise and transposed convolutions.
        exact_border: whether folded weights equal explicit equalizers on the border too.
        shift: "bias" if the means go there; None where there is none, or where a normalization per channel behind the
            layer takes every constant out.
        upstream: layers of the sites whose output reaches this one.
        norms: `running_mean` keys of the BatchNorms that this layer's output reaches, in graph order.
        pads_itself: whether the layer's module pads its input before the convolution (`padding_mode="reflect"`); what
            enters the layer is then what enters the padding.
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
    shift: Literal["bias"] | None
    branches: tuple[Branch, ...]
    upstream: tuple[str, ...] = field(default=(), repr=False)
    norms: tuple[str, ...] = field(default=(), repr=False)
    pads_itself: bool = field(default=False, repr=False)


def find_sites(graph: Graph) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    """All sites of a network in graph order, resampled and plain, and a refusal for every other concat."""
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for concat in graph.ops:
        if concat.kind != "concat":
            continue
        found, reasons = _sites_of(graph, concat)
        sites += found
        if reasons:
            plain = not any_resampled(graph, concat)
            refusals.append(Refusal(at=place(concat), reason="; ".join(dict.fromkeys(reasons)), plain=plain))
    refusals += _filled(graph)
    order = {op.name: place for place, op in enumerate(graph.ops)}
    sites.sort(key=lambda site: order[graph.readers[site.weight].name])
    if not sites:
        refusals += explain_nothing(graph, refusals)
    return tuple(_with_surroundings(graph, sites)), tuple(dict.fromkeys(refusals))


def _with_surroundings(graph: Graph, sites: Sequence[Site]) -> Iterator[Site]:
    """The sites, each with the sites before and the BatchNorms behind it."""
    names = {graph.readers[site.weight].name: site.layer for site in sites}
    upstream = graph.upstream(names)
    for name, site in zip(names, sites, strict=True):
        behind = (op.parameters.get("running_mean") for op in graph.ops if name in upstream[op.name])
        yield replace(
            site,
            upstream=tuple(layer for other, layer in names.items() if other in upstream[name]),
            norms=tuple(dict.fromkeys(key for key in behind if key is not None)),
        )


def _sites_of(graph: Graph, concat: Op) -> tuple[list[Site], list[str]]:
    """The sites that one concat feeds, and why its other readers are none."""
    sites: list[Site] = []
    reasons: list[str] = []
    nested = False
    for found in _readings(graph, concat):
        if isinstance(found, str):
            nested = nested or found == _NESTED
            reasons += [found] if found != _NESTED else []
            continue
        layer, way = found
        reason = _refuse_weight(graph, layer)
        if reason is None:
            sites.append(_site(graph, concat, layer, way))
        else:
            reasons.append(reason)
    if not sites and not reasons and not nested:
        reasons.append("nothing reads it")
    return sites, reasons


_NESTED = "part of another concat"


def _readings(graph: Graph, concat: Op) -> Iterator[tuple[Op, Sequence[Op]] | str]:
    """Walks forward from a concat: the layers that read it and the ops on the way, and a reason for every other end."""
    reached: dict[str, tuple[int, tuple[Op, ...]]] = {concat.name: (concat.attributes["dim"], ())}
    for consumer in graph.ops:
        read = [name for name in consumer.inputs if name in reached]
        if not read:
            continue
        op = graph[max(read, key=lambda name: len(reached[name][1]))]
        axis, way = reached[op.name]
        onward = carry_axis(op, consumer, axis)
        if consumer.kind == "concat":
            yield _NESTED if onward is not None else f"concatenated again along another axis in {place(consumer)}"
        elif consumer.kind in {"convolution", "linear"}:
            if consumer.inputs[0] != op.name or axis != summed_axis(graph, op, consumer):
                where = f"axis {axis} of {list(op.shape)}"
                yield f"concatenated along {where}, which {place(consumer)} does not sum over"
            else:
                yield consumer, way
        elif consumer.kind == "norm":
            yield f"already normalized by {consumer.target} {place(consumer)}"
        elif consumer.kind == "output":
            yield "returned as an output of the network"
        elif not _leads_on(graph, consumer, {name: axis for name, (axis, _) in reached.items()}):
            yield f"its consumer {consumer.target} in {place(consumer)} is not linear"
        elif onward is None:
            yield f"its channels do not stay whole in {consumer.target} of {place(consumer)}"
        else:
            reached[consumer.name] = onward, (*way, consumer)


def _leads_on(graph: Graph, consumer: Op, axes: Mapping[str, int]) -> bool:
    """Whether `consumer` may stand between a concat, whose channels are on these axes of tensors, and its layer."""
    if gated(graph, consumer) >= axes.keys() & set(consumer.inputs):
        return True
    if consumer.kind == "add":  # of what several gates let through, as in scSE
        return len({axes.get(name) for name in consumer.inputs}) == 1
    return consumer.kind in _FORWARD and scales_through(consumer)


# What the channels of a concat may pass through on their way to the fusion layer, beside gates. A per-channel affine
# map commutes with all of them but ReLU, pooling and gates, with which only its scale does.
_FORWARD: frozenset[Kind] = frozenset(
    {"identity", "resample", "relu", "pool", "pad", "crop", "permute", "reshape", "written"}
)


def _refuse_weight(graph: Graph, layer: Op) -> str | None:
    for role, key in ({"weight": None} | dict(layer.parameters)).items():
        if key is None:
            return f"the {role} of {place(layer)} is not a plain parameter"
        if graph.uses[key] > 1:
            return f"{key} is used {graph.uses[key]} times"
    return None


def _site(graph: Graph, concat: Op, layer: Op, way: Sequence[Op]) -> Site:
    weight = str(layer.parameters["weight"])
    path = weight.removesuffix(".weight")
    shape = graph.shapes[weight]
    groups = int(layer.attributes.get("groups", 1))
    transposed = bool(layer.attributes.get("transposed", False))
    bias = layer.parameters.get("bias")
    rank = len(shape if layer.kind == "convolution" else concat.shape) - 2
    branches = tuple(find_branches(graph, concat, way, weight, rank))
    norm, per_channel = _norm_behind(graph, layer)
    # a strided transposed kernel spreads a mean unevenly
    phases = transposed and any(stride > 1 for stride in layer.attributes["stride"])
    scale_only = phases or per_channel or any(op.kind in {"relu", "pool", "elementwise"} for op in way)
    shift: Literal["bias"] | None = "bias" if bias and not scale_only else None
    padded = layer.attributes.get("padded", False) or any(op.attributes.get("zero") for op in way)
    return Site(
        layer=path,
        weight=weight,
        bias=bias or None,
        norm=norm,
        op=layer.target.removesuffix("_"),
        kernel=shape[2:],
        axis=weight_axis(graph, layer),
        groups=groups,
        kind="resampled" if any(branch.resampling for branch in branches) else "plain",
        exact_border=shift is None or not padded,
        shift=shift,
        branches=branches,
        pads_itself=bool(way) and way[-1].kind == "pad" and way[-1].module == layer.module == path,
    )


def _norm_behind(graph: Graph, layer: Op) -> tuple[str | None, bool]:
    """The module of the normalization that alone reads the layer's output, and whether it is one per channel."""
    op, axis = layer, summed_axis(graph, layer, layer)
    while len(readers := graph.consumers[op.name]) == 1:
        (reader,) = readers
        if reader.kind == "norm":
            mean = reader.parameters.get("running_mean") or ""
            module = mean.removesuffix(".running_mean") if mean.endswith(".running_mean") else reader.module
            return module, axis == 1 and reader.attributes.get("per_channel", False)
        onward = carry_axis(op, reader, axis) if reader.kind in {"identity", "permute", "reshape"} else None
        if onward is None:
            break
        op, axis = reader, onward
    return None, False


def _filled(graph: Graph) -> Iterator[Refusal]:
    """Tensors into whose channels branches are written one after the other, where others concatenate."""
    for layer in graph.ops:
        if layer.kind not in {"convolution", "linear"} or not layer.inputs:
            continue
        op, axes = graph[layer.inputs[0]], []
        while op.kind == "written":
            before, write = (graph[name] for name in op.inputs)
            part = graph[write.inputs[0]]
            axes += [part.attributes["dim"]] if write.target == "copy_" and part.kind == "crop" else []
            op = before
        if axes.count(summed_axis(graph, op, layer)) > 1:
            yield Refusal(at=place(op), reason="filled slice by slice, which cannot be followed as a concat can")
