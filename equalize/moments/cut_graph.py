"""A traced network cut down to what the moments of its branches need.

Classifier, auxiliary heads and everything else behind the branches goes, and with it the last fusion layers, which are
most of a decoder's arithmetic. The moments of a branch are taken the moment it exists, so that it can be freed; a
branch that was interpolated is not even made (see `interpolated.py`). What is left is optimized (see `fx_passes.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._sympy.symbol import SymT, symbol_is_type

from equalize.graph.aten import named_arguments
from equalize.graph.export import export
from equalize.moments.fx_passes import memory_of, name_of, optimize_graph, sweep, without_mutations, written
from equalize.moments.interpolated import Interpolation, interpolated_moments
from equalize.moments.moments import ImageMoments, per_image
from equalize.moments.watch import named_tensors
from equalize.sites.sites import Site

_INTERPOLATIONS = {
    "upsample_bilinear2d": "upsample_linear1d",
    "upsample_nearest2d": "upsample_nearest1d",
    "_upsample_nearest_exact2d": "_upsample_nearest_exact1d",
}


class CutGraph:
    """The part of a network that its branches depend on; shares the network's parameters."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], example: tuple[Tensor, ...]) -> None:
        """Cuts `model`, in eval mode, for inputs like `example`, (N, C, H, W) each: one image, or any other number.

        Raises:
            ValueError: the network cannot be exported for batches of any size, or a site cannot be found in it.
        """
        single = all(len(tensor) == 1 for tensor in example)  # export specializes on a batch of one
        pair = tuple(tensor.new_empty((2, *tensor.shape[1:])) for tensor in example)
        program = export(model, example if single else pair, any_batch=not single)
        if any(symbol_is_type(symbol, SymT.UNBACKED_INT) for symbol in program.range_constraints):
            raise ValueError("sizes in the network depend on values")
        if not (single or _takes_any_batch(program)):
            raise ValueError("the network takes batches of one size only")
        self._lifted = _lifted(program, model)
        graph, self._ends = _cut(program, sites)
        self._takes_any_strides = optimize_graph(graph)
        self._interpreter = fx.Interpreter(program.graph_module, graph=graph)  # frees a tensor once nothing needs it

    def __call__(self, *inputs: Tensor) -> dict[str, list[ImageMoments]]:
        """The moments of each branch of each layer, for one batch of inputs such as (N, C, H, W)."""
        if self._takes_any_strides:
            inputs = tuple(_channels_last(tensor) for tensor in inputs)
        moments = self._interpreter.run(*self._lifted, *inputs, enable_io_processing=False)
        return {layer: [moments[index] for index in indices] for layer, indices in self._ends.items()}


def _channels_last(x: Tensor) -> Tensor:
    """x in the order of memory in which convolutions are fastest: on a CPU, or with 16 bits, channel after channel."""
    sixteen = torch.is_autocast_enabled(x.device.type) or x.dtype.itemsize == 2
    if x.ndim != 4 or not (sixteen or x.device.type == "cpu"):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _takes_any_batch(program: ExportedProgram) -> bool:
    """Whether the exported program is not specialized to a batch size."""
    ranges = program.range_constraints.values()
    return bool(ranges) and all(each.lower <= 2 and each.upper > 2**40 for each in ranges)


def _lifted(program: ExportedProgram, model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and constants, in the order of the graph's placeholders: the model's own tensors."""
    tensors = named_tensors(model)
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
    without_mutations(graph)
    keys = program.graph_signature.inputs_to_parameters
    placeholders = {keys[node.name]: node for node in graph.nodes if node.op == "placeholder" and node.name in keys}
    changing = written(graph)
    moments: list[fx.Node] = []
    ends: dict[str, list[int]] = {}
    for site in sites:
        if site.weight not in placeholders:
            raise ValueError(f"{site.weight} is not called in the graph itself")
        readers = [user for user in placeholders[site.weight].users if user.args[1:2] == (placeholders[site.weight],)]
        if len(readers) != 1:
            raise ValueError(f"{site.weight} is not read once")
        ends[site.layer] = []
        for take, source in _branches(readers[0], site, changing):
            if memory_of(source) in changing:  # later, where its moments are not taken
                raise ValueError(f"what {site.weight} reads is written into")
            with graph.inserting_after(source):
                moments.append(graph.create_node("call_function", take, (source,), name=f"moments_{len(moments)}"))
            ends[site.layer].append(len(moments) - 1)
    graph.output(tuple(moments))
    sweep(graph)
    return graph, ends


def _branches(
    reader: fx.Node, site: Site, changing: Set[fx.Node]
) -> Iterator[tuple[Callable[[Tensor], ImageMoments], fx.Node]]:
    """For each branch, the earliest node that tells its moments, and how; not before one of those that change."""
    data = reader.args[0]
    if site.pads_itself and isinstance(data, fx.Node):
        data = data.args[0]
    assert isinstance(data, fx.Node)
    leaves = _leaves(data, changing)
    widths = [branch.stop - branch.start for branch in site.branches]
    if site.op != "linear" and leaves and [_shape(leaf)[1] for leaf in leaves] == widths:
        for leaf in leaves:
            interpolation = _interpolation(leaf)
            if interpolation is None or leaf in changing:
                yield per_image, leaf
            else:
                yield partial(interpolated_moments, interpolation=interpolation), leaf.all_input_nodes[0]
        return
    axis = -1 if site.op == "linear" else 1
    for branch in site.branches:
        yield partial(_slice_moments, axis=axis, start=branch.start, width=branch.stop - branch.start), data


def _leaves(node: fx.Node, changing: Set[fx.Node]) -> list[fx.Node]:
    """The tensors of a concat along the channels, nested ones taken apart; [] if `node` is none."""
    while name_of(node) in {"dropout", "clone", "contiguous", "feature_dropout"} and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if name_of(node) != "cat" or node in changing or named_arguments(node)["dim"] % len(_shape(node)) != 1:
        return []
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
    parts = [tensor for tensor in tensors if isinstance(tensor, fx.Node) and 0 not in _shape(tensor)]
    return [leaf for tensor in parts for leaf in _leaves(tensor, changing) or [tensor]]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _slice_moments(u: Tensor, *, axis: int, start: int, width: int) -> ImageMoments:
    return per_image(u.narrow(axis, start, width))


def _interpolation(node: fx.Node) -> Interpolation | None:
    """The interpolation that a node is, if its moments can be had from its source."""
    operator = _INTERPOLATIONS.get(name_of(node))
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
