"""The calibration pass: run the network over images, keep the moments of every branch."""

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from equalize.branches import Branch
from equalize.errors import NumericsError, SiteError
from equalize.moments import ImageMoments, Moments, per_image, pool
from equalize.sites import Site
from equalize.taps import Batch, Call, run, undisturbed

__all__ = ["measure"]

# With fewer images an interval says little, and stopping early would rest on luck.
_FEWEST_IMAGES = 8


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
        batches: the network's own inputs, (N, C, H, W) each or tuples of tensors; of any sizes.
        tolerance: stop as soon as `ci95` of every branch is at most this.
        names: what to call the images in messages, in the order of `batches`.

    Returns:
        For each site's layer the moments of its branches, in order.

    Raises:
        NumericsError: at the first non-finite value; says the layer and the image.
        SiteError: if there is no image, or a layer is not called as it was traced.
    """
    blocks: dict[str, list[list[ImageMoments]]] = {site.layer: [[] for _ in site.branches] for site in sites}
    handlers = {site.weight: _handler(site, blocks[site.layer], names) for site in sites}
    seen = 0
    if sites:
        with undisturbed(model):
            for _ in run(model, handlers, batches):
                seen += 1
                if tolerance is not None and _known(blocks, tolerance):
                    break
        if not seen:
            raise SiteError("batches", "hold no image", remedy="give at least one")
    return {layer: [pool(branch) for branch in branches] for layer, branches in blocks.items()}


def _handler(site: Site, blocks: list[list[ImageMoments]], names: Sequence[str]) -> Callable[[Call], None]:
    def keep(call: Call) -> None:
        u = channels_first(call.data, site)
        if u.shape[1] != site.branches[-1].stop:
            raise SiteError(site.layer, "gets another input than when it was traced", got=list(call.data.shape))
        for branch, block in zip(site.branches, blocks, strict=True):
            moments = per_image(u[:, branch.start : branch.stop])
            _demand_finite(site, branch, moments, sum(len(each.mean_N) for each in block), names)
            block.append(moments)

    return keep


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
