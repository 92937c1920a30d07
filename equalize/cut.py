"""A traced network cut down to what the moments of its branches need.

Classifier, auxiliary heads and everything else behind the branches goes, and with it the last fusion layers, which are
most of a decoder's arithmetic. The moments of a branch are taken the moment it exists, so that it can be freed; a
branch that was interpolated is not even made: with U = U_h (x) U_w the interpolation matrix and d the centred source,
sum(U d) and sum((U d)^2) = d' (U'U) d follow exactly from the source.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from equalize.aten import named_arguments
from equalize.moments import ImageMoments, corrected, per_image, promote
from equalize.sites import Site
from equalize.tracing import export

__all__ = ["CutGraph", "Interpolation", "interpolated_moments"]

_INTERPOLATIONS = {
    "upsample_bilinear2d": "upsample_linear1d",
    "upsample_nearest2d": "upsample_nearest1d",
    "_upsample_nearest_exact2d": "_upsample_nearest_exact1d",
}
_VIEWS = ("slice", "select", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "narrow", "expand")


class CutGraph:
    """The part of a network that its branches depend on; shares the network's parameters."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], example: tuple[Tensor, ...]) -> None:
        """Cuts `model`, as it is called with inputs like `example`: one image, or any other number of them.

        Raises:
            ValueError: the network cannot be exported for batches of any size, or a site cannot be found in it.
        """
        single = all(len(tensor) == 1 for tensor in example)  # export treats one image as a case of its own
        pair = tuple(tensor.new_empty((2, *tensor.shape[1:])) for tensor in example)
        program = export(model, example if single else pair, any_batch=not single)
        if not (single or _takes_any_batch(program)):
            raise ValueError("the network takes batches of one size only")
        self._lifted = _lifted(program, model)
        graph, self._ends = _cut(program, sites)
        self._interpreter = fx.Interpreter(program.graph_module, graph=graph)

    def __call__(self, *inputs: Tensor) -> dict[str, list[ImageMoments]]:
        """The moments of each branch of each layer, for one batch."""
        results = self._interpreter.run(*self._lifted, *inputs, enable_io_processing=False)
        return {layer: [results[index] for index in indices] for layer, indices in self._ends.items()}


def _takes_any_batch(program: ExportedProgram) -> bool:
    """Whether the traced code asked nothing of the batch that ties it to a size."""
    ranges = program.range_constraints.values()
    return bool(ranges) and all(each.lower <= 2 and each.upper > 2**40 for each in ranges)


def _lifted(program: ExportedProgram, model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and constants, in the order of the graph's placeholders: the model's own tensors."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    constants: Mapping[str, Any] = program.constants
    targets = [spec.target for spec in program.graph_signature.input_specs if spec.target is not None]
    return [tensors[target] if target in tensors else constants[target] for target in targets]


def _cut(program: ExportedProgram, sites: Sequence[Site]) -> tuple[fx.Graph, dict[str, list[int]]]:
    """A copy of the program's graph that ends in the moments of the sites' branches."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(program.graph, copied)
    for node in list(graph.nodes):
        if node.op == "output":
            graph.erase_node(node)
    _without_mutations(graph)
    keys = program.graph_signature.inputs_to_parameters
    placeholders = {keys[node.name]: node for node in graph.nodes if node.op == "placeholder" and node.name in keys}
    moments: list[fx.Node] = []
    ends: dict[str, list[int]] = {}
    for site in sites:
        if site.weight not in placeholders:
            raise ValueError(f"{site.weight} is not called in the graph itself")
        readers = [user for user in placeholders[site.weight].users if user.args[1:2] == (placeholders[site.weight],)]
        if len(readers) != 1:
            raise ValueError(f"{site.weight} is not read once")
        ends[site.layer] = []
        for take, source in _branches(readers[0], site):
            with graph.inserting_after(source):
                moments.append(graph.create_node("call_function", take, (source,), name=f"moments_{len(moments)}"))
            ends[site.layer].append(len(moments) - 1)
    graph.output(tuple(moments))
    _sweep(graph)
    return graph, ends


def _without_mutations(graph: fx.Graph) -> None:
    """Replaces operators that write into their first argument by those that return a new tensor.

    Those that write into a view stay: they change a larger tensor.
    """
    for node in list(graph.nodes):
        name = _name(node)
        base = node.args[0] if node.args else None
        if not name.endswith("_") or not isinstance(base, fx.Node) or _name(base) in _VIEWS:
            continue
        packet = getattr(torch.ops.aten, name[:-1], None)
        overload = getattr(packet, getattr(node.target, "_overloadname", ""), None)
        if overload is None:
            continue
        node.target = overload
        place = {each: index for index, each in enumerate(graph.nodes)}
        for user in list(base.users):
            if user is not node and place[user] > place[node]:
                user.replace_input_with(base, node)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0] if node.op == "call_function" else ""


def _sweep(graph: fx.Graph) -> None:
    """Removes everything that the output does not depend on, in-place writes into what it does included."""
    output = next(iter(reversed(graph.nodes)))
    needed: set[fx.Node] = set()
    stack: list[fx.Node] = [output]
    writes = [node for node in graph.nodes if _name(node).endswith("_")]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
        if not stack:
            stack = [write for write in writes if write not in needed and _base(write) in needed]
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder" and node not in needed:
            graph.erase_node(node)


def _base(write: fx.Node) -> fx.Node:
    """The tensor that a write through views changes."""
    base = write.args[0]
    while isinstance(base, fx.Node) and _name(base) in _VIEWS:
        base = base.args[0]
    assert isinstance(base, fx.Node)
    return base


def _branches(reader: fx.Node, site: Site) -> Iterator[tuple[Callable[[Tensor], ImageMoments], fx.Node]]:
    """For each branch, the earliest node that tells its moments, and how."""
    data = reader.args[0]
    if site.pads_itself and isinstance(data, fx.Node):
        data = data.args[0]
    assert isinstance(data, fx.Node)
    leaves = _leaves(data)
    widths = [branch.stop - branch.start for branch in site.branches]
    if site.op != "linear" and leaves and [_shape(leaf)[1] for leaf in leaves] == widths:
        for leaf in leaves:
            interpolation = _interpolation(leaf)
            if interpolation is None:
                yield per_image, leaf
            else:
                yield partial(interpolated_moments, interpolation=interpolation), leaf.all_input_nodes[0]
        return
    axis = -1 if site.op == "linear" else 1
    for branch in site.branches:
        yield partial(_slice_moments, axis=axis, start=branch.start, width=branch.stop - branch.start), data


def _leaves(node: fx.Node) -> list[fx.Node]:
    """The tensors of a concat along the channels, nested ones taken apart; [] if `node` is none."""
    while _name(node) in {"dropout", "clone", "contiguous", "feature_dropout"} and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if _name(node) != "cat" or named_arguments(node)["dim"] % len(_shape(node)) != 1:
        return []
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
    return [leaf for tensor in tensors if isinstance(tensor, fx.Node) for leaf in _leaves(tensor) or [tensor]]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _slice_moments(u: Tensor, *, axis: int, start: int, width: int) -> ImageMoments:
    return per_image(u.narrow(axis, start, width))


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolation:
    """A separable interpolation of the last two axes.

    Attributes:
        operator: its name along one axis: upsample_linear1d, upsample_nearest1d, _upsample_nearest_exact1d.
        size: (H, W) that it makes.
        align_corners: None where the operator has no such argument.
        scales: the factors it was called with, which count for more than the sizes; None if by size.
    """

    operator: str
    size: tuple[int, int]
    align_corners: bool | None = None
    scales: tuple[float, float] | None = None

    def matrix(self, axis: int, length: int) -> Tensor:
        """U (size[axis], length), float64: what one axis of `length` entries is multiplied by."""
        scale = None if self.scales is None else [self.scales[axis]]
        extra = () if self.align_corners is None else (self.align_corners,)
        identity = torch.eye(length, dtype=torch.float64).unsqueeze(0)
        operator = getattr(torch.ops.aten, self.operator).vec
        matrix: Tensor = operator(identity, None if scale else [self.size[axis]], *extra, scale)[0].T
        return matrix


def _interpolation(node: fx.Node) -> Interpolation | None:
    """The interpolation that a node is, if its moments can be had from its source."""
    operator = _INTERPOLATIONS.get(_name(node))
    if operator is None or getattr(node.target, "_overloadname", "") != "vec":
        return None
    arguments = named_arguments(node)
    height, width = _shape(node)[2:]
    scales = arguments.get("scale_factors")
    return Interpolation(
        operator=operator,
        size=(height, width),
        align_corners=arguments.get("align_corners"),
        scales=(scales[0], scales[1]) if scales else None,
    )


def interpolated_moments(x: Tensor, interpolation: Interpolation) -> ImageMoments:
    """The moments of each image of x (N, C, h, w) after an interpolation, from x alone."""
    x = promote(x)
    rows_h, gram_hh = _gram(interpolation, 0, x.shape[2], x.dtype, x.device)
    rows_w, gram_ww = _gram(interpolation, 1, x.shape[3], x.dtype, x.device)
    m_N = x.flatten(1).mean(1)
    d_NChw = x - m_N.view(-1, 1, 1, 1)  # the rows of U sum to one: U x = U d + m
    r_N = d_NChw.sum(1) @ rows_w @ rows_h
    q_N = (d_NChw * (gram_hh @ d_NChw @ gram_ww)).flatten(1).sum(1)
    return corrected(x.shape[1] * interpolation.size[0] * interpolation.size[1], m_N, r_N, q_N)


@cache
def _gram(
    interpolation: Interpolation, axis: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """1'U (length,) and U'U (length, length)."""
    u = interpolation.matrix(axis, length)
    return u.sum(0).to(device, dtype), (u.T @ u).to(device, dtype)
