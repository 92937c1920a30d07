"""What each tracer says of a network. No tests."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from equalize.graph.export import exported_ops
from equalize.graph.graph import Graph, Op
from equalize.graph.record import record, record_fake
from equalize.plan.plan import site_json
from equalize.sites.sites import find_sites

__all__ = ["exported_ops", "graph_by", "record", "record_fake", "said_by"]

Example = tuple[Tensor, ...]
Tracer = Callable[[nn.Module, Example], tuple[Op, ...]]


def graph_by(tracer: Tracer, model: nn.Module, example: Example) -> Graph:
    """A network as one tracer reads it."""
    shapes = {key: tuple(tensor.shape) for key, tensor in nn.Module.state_dict(model).items()}
    return Graph(ops=tracer(model, example), shapes=shapes)


def said_by(tracer: Tracer, model: nn.Module, example: Example) -> tuple[Any, ...]:
    """Every field of every site, also as JSON, the refusals, and the order of the BatchNorms."""
    graph = graph_by(tracer, model, example)
    sites, refusals = find_sites(graph)
    return sites, [site_json(site) for site in sites], refusals, graph.norms_before
