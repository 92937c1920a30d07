"""The calibration pass: run the network over images, keep the moments of every branch."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import partial

import torch
from torch import Tensor, nn

from equalize.branches import Branch
from equalize.cut import CutGraph
from equalize.errors import NumericsError, SiteError
from equalize.moments import ImageMoments, Moments, per_image, pool
from equalize.sites import Site
from equalize.taps import Batch, Call, inputs_of, run, undisturbed

__all__ = ["channels_first", "measure"]

Found = dict[str, list[ImageMoments]]
"""Of one batch: by layer, the moments of each branch."""

# With fewer images an interval says little, and stopping early would rest on luck.
_FEWEST_IMAGES = 8
# Exporting and cutting a network takes seconds: from as many pixels on, that comes back. Inputs of further sizes than
# the first few are not cut for.
_PAYS = 2**24
_MOST_CUTS = 4


def measure(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    tolerance: float | None = None,
    names: Sequence[str] = (),
) -> dict[str, list[Moments]]:
    """Population moments, over N, space and channels, of each branch as it enters its fusion layer.

    Args:
        model: run in eval mode without gradients; mode, buffers and hooks are left as they were.
        sites: from `scan`.
        batches: the network's own inputs, (N, C, H, W) each or tuples of tensors; of any sizes. With many images and a
            length known, the network is first cut down to what the moments need (see `cut.py`).
        tolerance: stop as soon as `ci95` of every branch is at most this.
        names: what to call the images in messages, in the order of `batches`.

    Returns:
        For each site's layer the moments of its branches, in order.

    Raises:
        NumericsError: at the first non-finite value; says the layer and the image.
        SiteError: if there is no image, or a layer is not called as it was traced.
    """
    blocks: dict[str, list[list[ImageMoments]]] = {site.layer: [[] for _ in site.branches] for site in sites}
    if sites:
        with undisturbed(model):
            for found in _found_in_each(model, sites, batches):
                for site in sites:
                    _keep(site, found[site.layer], blocks[site.layer], names)
                if tolerance is not None and _known(blocks, tolerance):
                    break
        if not blocks[sites[0].layer][0]:
            raise SiteError("batches", "hold no image", remedy="give at least one")
    return {layer: [pool(branch) for branch in branches] for layer, branches in blocks.items()}


def _found_in_each(model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]) -> Iterator[Found]:
    """The moments of every branch in each batch, by the cheaper way."""
    if isinstance(batches, Sized) and isinstance(batches, Iterable) and len(batches):
        ahead = iter(batches)
        first = next(ahead, None)
        if first is None:
            return
        pixels = len(batches) * math.prod(inputs_of(first)[0].shape) // max(inputs_of(first)[0].shape[1], 1)
        way = _by_cut_graph if pixels >= _PAYS else _by_hooks
        yield from way(model, sites, itertools.chain([first], ahead))
    else:
        yield from _by_hooks(model, sites, batches)


def _by_hooks(model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]) -> Iterator[Found]:
    """Runs the network up to the last fusion layer and looks at what enters each."""
    found: Found = {}
    handlers = {site.weight: partial(_take, site, found) for site in sites}
    for _ in run(model, handlers, batches):
        yield dict(found)


def _by_cut_graph(model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]) -> Iterator[Found]:
    """Runs what is left of the network when all is cut off that the branches do not need; one graph an input size."""
    cuts: dict[tuple[bool, tuple[torch.Size, ...]], CutGraph | None] = {}
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    for batch in batches:
        inputs = tuple(tensor.to(device) for tensor in inputs_of(batch))
        shape = (len(inputs[0]) == 1, tuple(tensor.shape[1:] for tensor in inputs))
        if shape not in cuts:
            cuts[shape] = _cut(model, sites, inputs) if len(cuts) < _MOST_CUTS else None
        cut = cuts[shape]
        yield cut(*inputs) if cut is not None else next(_by_hooks(model, sites, [batch]))


def _cut(model: nn.Module, sites: Sequence[Site], inputs: tuple[Tensor, ...]) -> CutGraph | None:
    try:
        return CutGraph(model, sites, inputs)
    except (SiteError, ValueError):  # made for one batch size only, or a site inside a region of its own
        return None


def _take(site: Site, found: Found, call: Call) -> None:
    u = channels_first(call.unpadded if site.pads_itself else call.data, site)
    if u.shape[1] != site.branches[-1].stop:
        raise SiteError(site.layer, "gets another input than when it was traced", got=list(call.data.shape))
    found[site.layer] = [per_image(u[:, branch.start : branch.stop]) for branch in site.branches]


def _keep(site: Site, found: list[ImageMoments], blocks: list[list[ImageMoments]], names: Sequence[str]) -> None:
    for branch, moments, block in zip(site.branches, found, blocks, strict=True):
        _demand_finite(site, branch, moments, sum(len(each.mean_N) for each in block), names)
        block.append(moments)


def channels_first(data: Tensor, site: Site) -> Tensor:
    """A fusion layer's input as (N, C, *)."""
    if site.op == "linear":
        return data.movedim(-1, 1) if data.ndim > 1 else data.unsqueeze(0)
    return data if data.ndim == len(site.kernel) + 2 else data.unsqueeze(0)


def _demand_finite(site: Site, branch: Branch, moments: ImageMoments, before: int, names: Sequence[str]) -> None:
    finite = (moments.mean_N + moments.m2_N).isfinite()
    if finite.all():
        return
    index = before + int((~finite).nonzero()[0])
    raise NumericsError(
        site.layer,
        f"gets non-finite values in channels {branch.start}..{branch.stop} from {branch.source}",
        got=f"image {names[index] if index < len(names) else index}",
        remedy="check that image and the weights before this layer, or measure in float32",
    )


def _known(blocks: dict[str, list[list[ImageMoments]]], tolerance: float) -> bool:
    branches = [branch for each in blocks.values() for branch in each]
    if sum(len(block.mean_N) for block in branches[0]) < _FEWEST_IMAGES:
        return False
    intervals = (pool(branch).ci95 for branch in branches)
    return all((math.inf if interval is None else interval) <= tolerance for interval in intervals)
