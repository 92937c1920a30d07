"""What reads a branch in training alone, such as auxiliary heads, moves or holds it too. Pure Python."""

from collections.abc import Iterable
from dataclasses import replace

from equalize.graph.graph import Graph, Training
from equalize.sites.branches import Branch
from equalize.sites.readers import Reader, all_readers
from equalize.sites.sites import Site

_Part = tuple[str, int, int]


def with_training(site: Site, graph: Graph, training: Training) -> Site:
    """The site of `graph`, each branch with what reads it in training, or held where that cannot follow."""
    return replace(site, branches=tuple(_with_training(site, each, graph, training) for each in site.branches))


def _with_training(site: Site, branch: Branch, graph: Graph, training: Training) -> Branch:
    if branch.fixed is not None:
        return branch
    readers: set[Reader] = set(branch.readers)
    reason = _unknown(branch, graph, training)
    for other in training.graphs:
        if reason is None:
            found = _readers_in(site, branch, other)
            readers.update(found if not isinstance(found, str) else ())
            reason = f"{found}, in training" if isinstance(found, str) else None
    if reason is not None:
        return replace(branch, producers=(), readers=(), fixed=reason)
    return replace(branch, readers=tuple(sorted(readers, key=lambda each: (each.weight, each.start))))


def _unknown(branch: Branch, graph: Graph, training: Training) -> str | None:
    """Why it is not known what reads a branch: an uncalled layer takes as many channels, as a library's own loop calls
    auxiliary heads."""
    if not training.graphs:
        return "what else reads this branch in training is not known: the network cannot be traced in training mode"
    widths = {graph.shapes[key][0] for key in branch.producers if not _is_transposed(graph, key)}
    widths |= {graph.shapes[key][1] for key in branch.producers if _is_transposed(graph, key)}
    reader = next((key for key, taken in training.uncalled.items() if taken in widths), None)
    return None if reader is None else f"{reader}, which the network's forward does not call, may read this branch"


def _is_transposed(graph: Graph, key: str) -> bool:
    return len(graph.shapes[key]) > 1 and bool(graph.readers[key].attributes.get("transposed"))


def _readers_in(site: Site, branch: Branch, other: Graph) -> set[Reader] | str:
    """The other layers that read a branch in another pass; a clause on what does not undo a scale there."""
    shared = next((key for key in branch.producers if other.uses[key] > 1), None)
    if shared is not None:
        return f"{shared} is used {other.uses[shared]} times"
    made = {op.name: op for key in branch.producers if (op := other.readers.get(key)) is not None}
    readers = all_readers(other, made.values())
    if isinstance(readers, str):
        return readers
    known = _parts(branch.readers) | {(site.weight, branch.start, branch.stop)}
    weights = {weight for weight, *_ in known if other.uses[weight]}
    if {part for part in _parts(readers) if part[0] in weights} != {part for part in known if part[0] in weights}:
        return "a layer that reads this branch reads something else"
    return {each for each in readers if each.weight != site.weight}


def _parts(readers: Iterable[Reader]) -> set[_Part]:
    return {(each.weight, each.start, each.stop) for each in readers}
