"""All of it: find the sites, measure them level by level, make the plan, apply it.

`preserve` and `migrate` keep the network's function, so one pass over the data serves all sites. `rescale` and
`reinit` change what comes after them: a site behind one that was rewritten is measured once that one, and the
BatchNorms between the two, stand as they will be saved.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from equalize.errors import SiteError
from equalize.moments.batch_norms import estimate_norms, untouched_norms
from equalize.moments.blocks import Blocks
from equalize.moments.measure import measure
from equalize.moments.moments import Moments
from equalize.moments.watch import Batch, inputs_of
from equalize.plan.apply import apply_edits, with_aliases
from equalize.plan.plan import Edit, Plan, Strategy
from equalize.plan.strategies import CHANGES_FUNCTION, choose, equalize_site, with_moments
from equalize.sites.scan import Scan, scan
from equalize.sites.sites import Refusal, Site

__all__ = ["calibrate", "norms_behind", "re_estimate", "stages"]

# Without a tolerance asked for, the moments count as converged when every sigma is known this well.
CONVERGED = 0.05


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch] | Blocks,
    strategy: Strategy = "preserve",
    seed: int = 0,
    *,
    keep_norm: bool = False,
    drawn: Collection[str] = (),
    found: Scan | None = None,
    tolerance: float | None = None,
    names: Sequence[str] = (),
    compiled: bool = False,
) -> Plan:
    """Measures `model` on `batches` and embeds scale equalization into it, in place.

    Args:
        model: any module; only the tensors in the plan's `changed` are rewritten.
        batches: the network's own inputs, (N, C, H, W) or tuples. Iterated once for `preserve` and `migrate`, several
            times for the others (a one-shot iterator is then kept in memory).
        strategy: see `equalize.plan.strategies`.
        seed: of `reinit`.
        keep_norm: rescale each equalized weight to the norm it had.
        drawn: state-dict keys of weights that were drawn just now; "auto" equalizes those as drawn.
        found: the sites to equalize; by default all resampled ones.
        tolerance: stop measuring when the 95 % interval of every sigma is this tight, relative to it.
        names: what to call the images in messages.
        compiled: see `measure`.

    Returns:
        The plan, applied; with it `apply` does the same to another copy of the model, without data.

    Raises:
        NumericsError: at the first non-finite value. SiteError: for an unknown strategy, or no images.
    """
    start = time.perf_counter()
    if isinstance(batches, Iterator):
        batches = list(batches)
    shapes = batches.shapes if isinstance(batches, Blocks) else None
    if found is None or shapes is None:
        first = _first(batches)
        shapes = tuple(tuple(tensor.shape) for tensor in inputs_of(first))
        found = found or scan(model, first)
    sites = [replace(site, strategy=choose(site, strategy, drawn)) for site in found.sites]
    moments: dict[str, list[Moments]] = {}
    ways: list[str] = []
    done: list[Site] = []
    edits: list[Edit] = []
    refusals: list[Refusal] = []
    if any(site.strategy in CHANGES_FUNCTION for site in sites):
        edits += re_estimate(model, untouched_norms(model), batches, found)
    for stage in stages(sites):
        moments |= measure(model, stage, batches, tolerance=tolerance, names=names, compiled=compiled, tell=ways.append)
        for site in stage:
            measured = with_moments(site, moments[site.layer])
            result = equalize_site(model, measured, seed=seed + sites.index(site), keep_norm=keep_norm)
            if isinstance(result, Refusal):
                refusals.append(result)
            else:
                done.append(measured)
                apply_edits(result, model)
                edits += result
        edits += re_estimate(model, norms_behind(stage, sites), batches, found)
    done.sort(key=lambda site: [each.layer for each in sites].index(site.layer))
    return Plan(
        strategy=strategy,
        seed=seed,
        keep_norm=keep_norm,
        sites=tuple(done),
        refusals=(*found.refusals, *refusals),
        edits=with_aliases(_without_superseded(edits), model),
        facts={
            "images": max((each.images or 0 for branches in moments.values() for each in branches), default=0),
            "seconds": round(time.perf_counter() - start, 3),
            "measured_by": ways[0] if ways else None,
            "input_shape": [2, *shapes[0][1:]] if len(shapes) == 1 else None,
            "converged": _converged(moments, CONVERGED if tolerance is None else tolerance),
        },
    )


def _first(batches: Iterable[Batch] | Blocks) -> Batch:
    if isinstance(batches, Blocks):
        batches = (batch for block in batches.read(0, 1) for batch in block.batches)
    first = next(iter(batches), None)
    if first is None:
        raise SiteError("batches", "hold no image", remedy="give at least one")
    return first


def stages(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that can be measured in one pass: as many rewritten levels lie before each."""
    changing = {site.layer for site in sites if site.strategy in CHANGES_FUNCTION}
    level: dict[str, int] = {}
    for site in sites:  # in graph order, so those upstream are known
        before = (level[layer] + (layer in changing) for layer in site.upstream if layer in level)
        level[site.layer] = max(before, default=0)
    return [[site for site in sites if level[site.layer] == each] for each in sorted(set(level.values()))]


def norms_behind(stage: Sequence[Site], sites: Sequence[Site]) -> list[str]:
    """The BatchNorms that a rewritten stage reaches and no later rewriting does."""
    changing = [site for site in sites if site.strategy in CHANGES_FUNCTION]
    behind = [norm for site in changing if site in stage for norm in site.norms]
    layers = [site.layer for site in stage]
    later = {
        norm
        for site in changing
        if site.layer not in layers and set(site.upstream) & set(layers)
        for norm in site.norms
    }
    return [norm for norm in dict.fromkeys(behind) if norm not in later]


def re_estimate(model: nn.Module, norms: Sequence[str], batches: Iterable[Batch] | Blocks, found: Scan) -> list[Edit]:
    """Re-estimates norms, each on what it will see, and writes them into the model."""
    values: Mapping[str, Tensor] = estimate_norms(model, norms, batches, found.norms)
    edits = [
        Edit(tensor=key, action="set", values=tuple(value.double().flatten().tolist())) for key, value in values.items()
    ]
    apply_edits(edits, model)
    return edits


def _without_superseded(edits: Sequence[Edit]) -> list[Edit]:
    """The edits without those whose tensor is set anew later."""
    last = {edit.tensor: index for index, edit in enumerate(edits) if edit.action == "set"}
    return [edit for index, edit in enumerate(edits) if index >= last.get(edit.tensor, -1)]


def _converged(moments: Mapping[str, Sequence[Moments]], tolerance: float) -> bool:
    intervals = [each.ci95 for branches in moments.values() for each in branches]
    return all(interval is not None and interval <= tolerance for interval in intervals)
