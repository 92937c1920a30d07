"""Concats that cannot be equalized, and reasons for networks without sites. Pure Python."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from equalize.graph.graph import Graph, Op
from equalize.sites.branches import resampling_of
from equalize.sites.readers import place


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A concat that became no site.

    Attributes:
        at: the module it happens in. reason: why.
        plain: whether none of its tensors was resampled, as within an encoder; not written.
    """

    at: str
    reason: str
    plain: bool = field(default=False, compare=False)

    def to_json(self) -> dict[str, str]:
        """What stands in JSON."""
        return {"at": self.at, "reason": self.reason}


def explain_nothing(graph: Graph, refusals: Sequence[Refusal]) -> Iterator[Refusal]:
    """Why a network without sites has none, where no refused concat says it."""
    additions = [op for op in graph.ops if op.kind == "add" and _adds_resampled(graph, op)]
    for at in dict.fromkeys(place(op) for op in additions):
        yield Refusal(at=at, reason="fuses by addition: no fusion weights stand behind the branches")
    if not additions and not refusals:
        yield Refusal(at="model", reason="has no concat of features")


def _adds_resampled(graph: Graph, addition: Op) -> bool:
    """Whether some of the added tensors were resampled, on ways that do not mix places, and others not so."""
    ways = [frozenset(_resamplings(graph, graph[name])) for name in addition.inputs if name in graph.fed]
    return len(set(ways)) > 1


def _resamplings(graph: Graph, op: Op) -> Iterator[str]:
    while True:
        if resampling_of(op):
            yield op.name
            return
        weight = graph.shapes.get(op.parameters.get("weight") or "", ())
        pointwise = op.kind == "convolution" and math.prod(weight[2:]) == 1
        if not pointwise and op.kind not in {"identity", "relu", "activation", "norm", "crop", "pad"}:
            return
        op = graph[op.inputs[0]]
