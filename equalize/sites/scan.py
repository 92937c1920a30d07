"""Finds the fusion layers of a model, given an example input."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor, nn

from equalize.errors import SiteError
from equalize.graph.export import trace, trace_training
from equalize.graph.record import Call
from equalize.sites.refusals import Refusal
from equalize.sites.sites import Site, SiteKind, find_sites
from equalize.sites.training import with_training
from equalize.wrappers import unwrapped

_RESAMPLED: tuple[SiteKind, ...] = ("resampled",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """The fusion layers of a network.

    Attributes:
        sites: fusion layers of the given kinds, in graph order.
        refusals: what cannot be equalized, and why.
        tracer: how the network was read.
        ran: whether it had to be run for that, see `Graph`.
        unlisted: how many sites of other kinds there are.
        norms: `running_mean` keys of the BatchNorms, each with those before it.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    tracer: Literal["export", "recorder"]
    ran: bool = False
    unlisted: int = 0
    norms: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)


def scan(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    kinds: Collection[SiteKind] = _RESAMPLED,
    *,
    calls: Sequence[Call] = (),
) -> Scan:
    """Finds the fusion layers of `model`.

    Args:
        model: any module, on any device, the meta device included; it is run only if that alone can read it. Keys are
            those of the network inside of DistributedDataParallel, DataParallel or torch.compile.
        example: an input or a tuple of inputs, (N, C, H, W); values matter only where the network must be run.
        kinds: "resampled" where a branch was resampled, "plain" where none was.
        calls: functions of a network and its inputs by which it is trained, where that is not its own forward: they say
            what reads its branches in training.

    Raises:
        SiteError: the network cannot be traced with such an input, or a kind is unknown.
        ResourceError: there is no memory to run it.
    """
    names = {kinds} if isinstance(kinds, str) else set[str](kinds)
    if unknown := sorted(names.difference(get_args(SiteKind))):
        expected = " or ".join(get_args(SiteKind))
        raise SiteError("kinds", "has unknown names", got=", ".join(unknown), expected=expected)
    network = unwrapped(model)
    graph = trace(network, example)
    sites, refusals = find_sites(graph)
    listed = tuple(site for site in sites if site.kind in names)
    movable = [branch for site in listed for branch in site.branches if branch.producers]
    if movable:
        keys = {site.weight for site in listed}
        for branch in movable:
            keys.update(branch.producers, (reader.weight for reader in branch.readers))
        training = trace_training(network, example, graph, keys, calls)
        listed = tuple(with_training(site, graph, training) for site in listed)
    return Scan(
        sites=listed,
        refusals=refusals,
        tracer=graph.tracer,
        ran=graph.ran,
        unlisted=len(sites) - len(listed),
        norms=graph.norms_before,
    )
