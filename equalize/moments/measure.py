"""The calibration pass: run the network over images, keep the moments of every branch."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from equalize.errors import EqualizeError, NumericsError, SiteError
from equalize.eval_mode import eval_mode
from equalize.moments.blocks import Block, Blocks, as_blocks, is_due, rounds
from equalize.moments.covariance import Collector, Rows, SplitStatistics, rows_of
from equalize.moments.cut_graph import CutGraph, Seen, together
from equalize.moments.histograms import count_values
from equalize.moments.moments import ImageMoments, Moments, by_image, per_image, pool
from equalize.moments.sampling import draw_fractions, sample
from equalize.moments.watch import Batch, Call, images_in, inputs_of, observe
from equalize.sites.scan import Scan
from equalize.sites.sites import Site
from equalize.wrappers import unwrapped

CONVERGED = 0.05
"""Where all images are measured, moments count as converged when every sigma is known this well."""

# Exporting and cutting a network takes seconds: it pays off from this many pixels on.
_PAYS = 2**23


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a pass over the images found.

    Attributes:
        moments: by layer, of its branches in order.
        method: "cut graph", or "hooks" and why; "" where there was nothing to measure.
        shapes: of the first batch's tensors, (N, C, H, W) each.
        statistics: by layer, of its input channels, if asked for and where rows of the input belong to images.
        histograms: by layer, of its branches' values (B, BINS), see `histograms.py`; likewise.
    """

    moments: dict[str, list[Moments]]
    method: str
    shapes: tuple[tuple[int, ...], ...]
    statistics: Mapping[str, SplitStatistics] = field(default_factory=dict)
    histograms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """How many images were measured."""
        return max((each.images or 0 for branches in self.moments.values() for each in branches), default=0)

    def is_known(self, tolerance: float) -> bool:
        """Whether the interval of every branch's standard deviation is this tight; for 0 as tight as `CONVERGED`."""
        return _known([each for branches in self.moments.values() for each in branches], tolerance or CONVERGED)


class _Rows(NamedTuple):
    """Moments of one batch: B branches of all sites, N images, S = mean and M2 in float64.

    `counts` says how many numbers an image has in each branch; `moments_BSN` (B, 2, N) is on the model's device.
    `sampled` are rows of each layer's input channels and `histograms` counts of its branches' values, if asked for.
    """

    counts: list[int]
    moments_BSN: Tensor
    sampled: Mapping[str, Rows | None]
    histograms: Mapping[str, Tensor]


def measure(
    model: nn.Module,
    sites: Sequence[Site] | Scan,
    batches: Iterable[Batch] | Blocks,
    *,
    tolerance: float = 0.0,
    names: Sequence[str] = (),
) -> dict[str, list[Moments]]:
    """Population moments, over N, space and channels, of each branch as it enters its fusion layer.

    Args:
        model: run in eval mode without gradients; mode, buffers and hooks are left as they were.
        sites: from `scan`, or what it gave.
        batches: the network's own inputs, (N, C, H, W) or tuples of tensors, of any sizes. If they are many and their
            number is known, the network is first cut down (see `cut_graph.py`). Processes may share `Blocks`.
        tolerance: stop as soon as `ci95` of every branch is at most this, decided whenever another 32 images are
            measured; 0 for all images. They should come in random order then.
        names: what to call the images in messages, in the order of `batches`.

    Returns:
        For each site's layer the moments of its branches, in order; the same in all processes.

    Raises:
        NumericsError: at the first non-finite value, with the layer and the image.
        SiteError: if there is no image, a layer is not in the network, or is not called as it was traced.
    """
    sites = sites.sites if isinstance(sites, Scan) else sites
    return measure_branches(unwrapped(model), sites, batches, tolerance=tolerance, names=names).moments


def measure_branches(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch] | Blocks,
    *,
    tolerance: float = 0.0,
    names: Sequence[str] = (),
    statistics: bool = False,
    histograms: bool = False,
) -> Measurement:
    """As `measure`, with the method and the shapes; if asked for, statistics of the input channels and histograms."""
    if not sites:
        return Measurement(moments={}, method="", shapes=())
    if any(parameter.is_meta for parameter in nn.Module.parameters(model)):
        raise SiteError(type(model).__name__, "is on the meta device, without weights", remedy="load its weights")
    blocks = as_blocks(batches, names)
    rows: list[_Rows] = []
    counted: dict[str, Tensor] = {}
    shapes = blocks.shapes
    with eval_mode(model):
        meter = _Meter(model, sites, blocks, statistics=statistics, histograms=histograms)
        collector = Collector({site.layer: site.branches[-1].stop for site in sites if statistics}, meter.device)
        images = 0
        for part in rounds(blocks, decides=tolerance > 0):
            begun = [(block, meter.rows(block)) for block in part]  # without waiting for the accelerator
            if shapes is None and begun:
                shapes = tuple(tuple(tensor.shape) for tensor in inputs_of(begun[0][0].batches[0]))
            before = images
            found = part.gather([_finite(each, sites, block) for block, each in begun])
            for each in itertools.chain.from_iterable(found):
                collector.add(each.sampled)
                rows.append(each._replace(sampled={}, histograms={}))
                for layer, counts_BK in each.histograms.items():
                    counted[layer] = counts_BK + counted[layer] if layer in counted else counts_BK
                images += each.moments_BSN.shape[-1]
            if tolerance > 0 and is_due(before, images) and _known(map(pool, _by_branch(sites, rows)), tolerance):
                break
        branches = _by_branch(sites, rows)
        if not branches[0]:
            raise SiteError("batches", "hold no image", remedy="give at least one")
        moments = iter([pool(branch) for branch in branches])
        return Measurement(
            moments={site.layer: [next(moments) for _ in site.branches] for site in sites},
            method=meter.method,
            shapes=shapes or (),
            statistics=collector.results(),  # multiplies matrices, in full precision in here
            histograms=counted,
        )


class _Meter:
    """Measures batches: by the cut graph where possible, else by hooks.

    The graph is cut for images like the first. Those of other sizes or dtypes, and a single one left over at the end,
    are measured by hooks. So how a batch is measured depends neither on the process nor on what came before.

    Attributes:
        method: "cut graph", or "hooks (the reason)".
        device: of the model.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], blocks: Blocks, *, statistics: bool, histograms: bool
    ) -> None:
        self._model = model
        self._sites = sites
        self._statistics = statistics
        self._histograms = histograms
        self._samples = statistics or histograms
        self.device = next((tensor.device for tensor in nn.Module.parameters(model)), torch.device("cpu"))
        self._once: dict[bool, bool] = {}  # whether a pass over several images (over one) calls each layer once
        self._cuts: dict[tuple[object, ...], CutGraph] = {}
        shapes = blocks.shapes
        if not shapes or not all(shapes) or blocks.pixels < _PAYS:
            self.method = "hooks (so few images that cutting the graph would take longer)"
            return
        self.method = "cut graph"
        try:
            kinds = zip(shapes, blocks.dtypes or itertools.repeat(torch.float32), strict=False)
            example = tuple(torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in kinds)
            self._cuts[_key(example)] = CutGraph(model, sites, example, samples=self._samples)
        except (EqualizeError, ValueError) as error:  # made for one batch size only, a site inside a region of its own
            self.method = f"hooks (no cut graph: {' '.join(str(error).split())})"

    def rows(self, block: Block) -> list[_Rows]:
        """What a block's batches say, without waiting for the device."""
        found: list[_Rows] = []
        first = block.first
        for batch, labels_NHW in itertools.zip_longest(block.batches, block.labels):
            if images_in(batch):
                found.append(self._rows(batch, labels_NHW, first))
            first += images_in(batch)
        return found

    def _rows(self, batch: Batch, labels_NHW: Tensor | None, first: int) -> _Rows:
        images = images_in(batch)
        fractions_NP = draw_fractions(first, images) if self._samples else None
        seen = self._seen(batch, fractions_NP)
        branches = [branch for site in self._sites for branch in seen[site.layer].moments]
        sampled: dict[str, Rows | None] = {}
        if fractions_NP is not None and self._statistics:
            sampled = {layer: rows_of(each.samples, labels_NHW, first, fractions_NP) for layer, each in seen.items()}
        samples = {layer: each.samples for layer, each in seen.items()} if self._histograms else {}
        counted = count_values(samples, self._sites, images)
        if any(len(branch.mean_N) % images for branch in branches):
            images = 1  # which rows belong to which image is not known
        branches = [by_image([branch], images) for branch in branches]
        moments_BSN = torch.stack([torch.stack([branch.mean_N, branch.m2_N]) for branch in branches])
        return _Rows([branch.count for branch in branches], moments_BSN, sampled, counted)

    def _seen(self, batch: Batch, fractions_NP: Tensor | None) -> dict[str, Seen]:
        inputs = tuple(tensor.to(self.device, non_blocking=tensor.is_pinned()) for tensor in inputs_of(batch))
        fractions_NP = None if fractions_NP is None else fractions_NP.to(self.device)
        cut = self._cuts.get(_key(inputs), self._by_hooks)
        return cut(inputs, fractions_NP)

    def _by_hooks(self, inputs: tuple[Tensor, ...], fractions_NP: Tensor | None) -> dict[str, Seen]:
        """Runs the network up to the last fusion layer, and sees what enters each."""
        observers = {site.weight: partial(_seen_in, site, fractions_NP) for site in self._sites}
        images = images_in(inputs)
        (observed,) = observe(self._model, observers, [inputs], stop=self._once.get(images > 1, False))
        calls = {site.layer: observed.results[site.weight] for site in self._sites}
        self._once.setdefault(images > 1, all(len(each) == 1 for each in calls.values()))
        return {layer: together(each, images) for layer, each in calls.items()}


def _key(inputs: Sequence[Tensor]) -> tuple[object, ...]:
    """What a graph is cut for: one image, or any other number of them; their shapes and dtypes."""
    return inputs[0].shape[:1] == (1,), *((each.shape[1:], each.dtype) for each in inputs)


def _seen_in(site: Site, fractions_NP: Tensor | None, call: Call) -> Seen:
    u = channels_first(call.unpadded if site.pads_itself else call.data, site)
    if u.shape[1] != site.branches[-1].stop:
        raise SiteError(site.layer, "gets another input than when it was traced", got=list(call.data.shape))
    moments = [per_image(u[:, branch.start : branch.stop]) for branch in site.branches]
    return Seen(moments, [] if fractions_NP is None else [sample(u, fractions_NP)])


def channels_first(data: Tensor, site: Site) -> Tensor:
    """A fusion layer's input, (N, C, *), (C, *) or for a linear layer (N, *, C), as (N, C, *)."""
    if site.op == "linear":
        return data.movedim(-1, 1) if data.ndim > 1 else data.unsqueeze(0)
    return data if data.ndim == len(site.kernel) + 2 else data.unsqueeze(0)


def _finite(rows: Sequence[_Rows], sites: Sequence[Site], block: Block) -> list[_Rows]:
    """What a block says, on the CPU; a NumericsError names the first image and layer where one is not finite."""
    done: list[_Rows] = []
    before = 0
    for counts, moments_BSN, sampled, counted in rows:
        moments_BSN = moments_BSN.cpu()
        bad_NB = ~moments_BSN.isfinite().all(1).T
        if bad_NB.any():
            image, place = bad_NB.nonzero()[0].tolist()
            site, branch = [(site, branch) for site in sites for branch in site.branches][place]
            name = block.names[before + image] if before + image < len(block.names) else before + image
            what = f"gets non-finite values in channels {branch.start}..{branch.stop} from {branch.source}"
            remedy = "check that image and the weights before this layer, or measure in float32"
            raise NumericsError(site.layer, what, got=f"image {name}", remedy=remedy)
        before += len(bad_NB)
        on_cpu = {layer: each and each._replace(values_RC=each.values_RC.cpu()) for layer, each in sampled.items()}
        done.append(_Rows(counts, moments_BSN, on_cpu, {layer: each.cpu() for layer, each in counted.items()}))
    return done


def _by_branch(sites: Sequence[Site], rows: Iterable[_Rows]) -> list[list[ImageMoments]]:
    """For every branch of every site the moments of all images, in batches."""
    found: list[list[ImageMoments]] = [[] for site in sites for _ in site.branches]
    for counts, moments_BSN, *_ in rows:
        for branch, count, (mean_N, m2_N) in zip(found, counts, moments_BSN, strict=True):
            branch.append(ImageMoments(count=count, mean_N=mean_N, m2_N=m2_N))
    return found


def _known(branches: Iterable[Moments], tolerance: float) -> bool:
    return all(branch.ci95 is not None and branch.ci95 <= tolerance for branch in branches)
