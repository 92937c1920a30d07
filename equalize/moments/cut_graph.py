"""A traced network cut down to what the moments of its branches need.

Classifier, auxiliary heads and everything else behind the branches goes, and with it the last fusion layers, which are
most of a decoder's arithmetic. The moments of a branch are taken the moment it exists, so that it can be freed; a
branch that was interpolated is not even made (see `interpolated.py`). What is left is optimized (see `fx_passes.py`).
"""

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._sympy.symbol import SymT, symbol_is_type

from equalize.graph.aten import named_arguments
from equalize.graph.export import export
from equalize.graph.recorder import named_tensors
from equalize.moments.fx_passes import memory_of, name_of, optimize_graph, sweep, without_mutations, written
from equalize.moments.interpolated import Interpolation, interpolated_moments
from equalize.moments.moments import ImageMoments, by_call, per_image
from equalize.moments.sampling import Samples, sample, sample_interpolated
from equalize.sites.sites import Site

_INTERPOLATIONS = {
    "upsample_bilinear2d": "upsample_linear1d",
    "upsample_nearest2d": "upsample_nearest1d",
    "_upsample_nearest_exact2d": "_upsample_nearest_exact1d",
}


class Seen(NamedTuple):
    """What one batch says of a layer's input: moments of its branches; samples of runs of its channels, in order."""

    moments: list[ImageMoments]
    samples: list[Samples]


def together(calls: Sequence[Seen], images: int) -> Seen:
    """What all calls of a layer on a batch of so many images say; no samples where there are several."""
    if len(calls) == 1:
        return calls[0]
    return Seen([by_call(branch, images) for branch in zip(*(call.moments for call in calls), strict=True)], [])


class CutGraph:
    """The part of a network that its branches depend on; shares the network's parameters."""

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], example: tuple[Tensor, ...], *, samples: bool = False
    ) -> None:
        """Cuts `model`, in eval mode, for inputs like `example`, (N, C, H, W) each: one image, or any other number.

        With `samples` it reads values at sampled positions as well. A ValueError if the network cannot be exported for
        batches of any size, or a site cannot be found in it.
        """
        single = all(len(tensor) == 1 for tensor in example)  # export specializes on a batch of one
        pair = tuple(tensor.new_empty((2, *tensor.shape[1:])) for tensor in example)
        program = export(model, example if single else pair, any_batch=not single)
        if any(symbol_is_type(symbol, SymT.UNBACKED_INT) for symbol in program.range_constraints):
            raise ValueError("sizes in the network depend on values")
        if not (single or _takes_any_batch(program)):
            raise ValueError("the network takes batches of one size only")
        self._lifted = _lifted(program, model)
        graph, self._ends = _cut(program, sites, samples=samples)
        self._takes_any_strides = optimize_graph(graph)
        self._interpreter = fx.Interpreter(program.graph_module, graph=graph)  # frees a tensor once nothing needs it

    def __call__(self, inputs: Sequence[Tensor], fractions_NP: Tensor | None = None) -> dict[str, Seen]:
        """What each layer's input is, for one batch of inputs such as (N, C, H, W).

        Args:
            inputs: the network's.
            fractions_NP: where to sample, see `sampling.draw_fractions`; if, and only if, it was cut for samples.
        """
        if self._takes_any_strides:
            inputs = [_channels_last(tensor) for tensor in inputs]
        extra = () if fractions_NP is None else (fractions_NP,)
        found = self._interpreter.run(*self._lifted, *inputs, *extra, enable_io_processing=False)
        return {
            layer: Seen([found[index] for index in ends], [found[index] for index in samples])
            for layer, (ends, samples) in self._ends.items()
        }


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


def _cut(
    program: ExportedProgram, sites: Sequence[Site], *, samples: bool
) -> tuple[fx.Graph, dict[str, tuple[list[int], list[int]]]]:
    """A copy of the program's graph that ends in the moments of the sites' branches, and in their samples.

    By layer, which of its results are moments and which are samples; these read one more placeholder, the last.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(program.graph, copied)
    for node in list(graph.nodes):
        if node.op == "output":
            graph.erase_node(node)
    without_mutations(graph)
    keys = program.graph_signature.inputs_to_parameters
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    placeholders = {keys[node.name]: node for node in inputs if node.name in keys}
    changing = written(graph)
    with graph.inserting_after(inputs[-1]):
        fractions = (graph.placeholder("fractions"),) if samples else ()
    results: list[fx.Node] = []
    ends: dict[str, tuple[list[int], list[int]]] = {}
    for site in sites:
        if site.weight not in placeholders:
            raise ValueError(f"{site.weight} is not called in the graph itself")
        readers = [user for user in placeholders[site.weight].users if user.args[1:2] == (placeholders[site.weight],)]
        if len(readers) != 1:
            raise ValueError(f"{site.weight} is not read once")
        moments, read = _branches(readers[0], site, changing)
        ends[site.layer] = [], []
        for takes, arguments, places in zip(
            (moments, read if samples else []), ((), fractions), ends[site.layer], strict=True
        ):
            for take, source in takes:
                if memory_of(source) in changing:  # later, where its moments are not taken
                    raise ValueError(f"what {site.weight} reads is written into")
                with graph.inserting_after(source):
                    name = f"result_{len(results)}"
                    results.append(graph.create_node("call_function", take, (source, *arguments), name=name))
                places.append(len(results) - 1)
    graph.output(tuple(results))
    sweep(graph)
    return graph, ends


_Takes = list[tuple[Callable[..., Any], fx.Node]]


def _branches(reader: fx.Node, site: Site, changing: Set[fx.Node]) -> tuple[_Takes, _Takes]:
    """The earliest nodes that tell the moments of each branch and the samples of all, and how.

    Not before one of those that change.
    """
    data = reader.args[0]
    if site.pads_itself and isinstance(data, fx.Node):
        data = data.args[0]
    assert isinstance(data, fx.Node)
    leaves = _leaves(data, changing)
    widths = [branch.stop - branch.start for branch in site.branches]
    moments: _Takes = []
    samples: _Takes = []
    if site.op != "linear" and leaves and [_shape(leaf)[1] for leaf in leaves] == widths:
        for leaf in leaves:
            interpolation = _interpolation(leaf)
            if interpolation is None or leaf in changing:
                moments.append((per_image, leaf))
                samples.append((sample, leaf))
            else:
                source = leaf.all_input_nodes[0]
                moments.append((partial(interpolated_moments, interpolation=interpolation), source))
                samples.append((partial(sample_interpolated, interpolation=interpolation), source))
        return moments, samples
    axis = -1 if site.op == "linear" else 1
    for branch in site.branches:
        width = branch.stop - branch.start
        moments.append((partial(_slice_moments, axis=axis, start=branch.start, width=width), data))
    return moments, [(partial(_sample_all, axis=axis), data)]


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


def _sample_all(u: Tensor, fractions_NP: Tensor, *, axis: int) -> Samples:
    return sample(u.movedim(axis, 1), fractions_NP)


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
