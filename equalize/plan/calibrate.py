"""`calibrate`: finds the sites, measures them level by level, makes the plan and applies it.

`preserve` and `migrate` keep the network's function, so one pass over the data serves all sites. `rescale` and
`reinit` change what comes after them: a site behind one that was rewritten is measured once that one, and the
BatchNorms between the two, stand as they will be saved.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from equalize.errors import SiteError
from equalize.moments.batch_norms import estimate_norms, untouched_norms
from equalize.moments.blocks import Blocks
from equalize.moments.measure import Measurement, measure_branches
from equalize.moments.watch import Batch
from equalize.plan.apply import apply_edits, put_back, undone_on_failure, with_aliases
from equalize.plan.choose import Choice, choose
from equalize.plan.edits import Edit, Set
from equalize.plan.indicator import Optimizer
from equalize.plan.parametrization import demand_folded
from equalize.plan.plan import Plan, ScaleTo, Strategy
from equalize.plan.rewritten import demand_not_rewritten, remember_rewritten
from equalize.plan.strategies import Decision, decide
from equalize.sites.scan import Scan, scan
from equalize.wrappers import unwrapped


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch] | Blocks,
    strategy: Strategy = "preserve",
    seed: int = 0,
    *,
    scale: ScaleTo = "step",
    optimizer: Optimizer = "adamw",
    newly_initialized: Collection[str] = (),
    found: Scan | None = None,
    tolerance: float = 0.0,
    names: Sequence[str] = (),
    keep: Callable[[Measurement], None] | None = None,
) -> Plan:
    """Measures `model` on `batches`, embeds scale equalization into it, in place, and returns the plan.

    Args:
        model: any module; only the tensors in the plan's `changed` are rewritten, and none if this fails.
        batches: the network's own inputs, (N, C, H, W) or tuples, read several times; iterators are kept in memory.
        strategy, seed, scale, newly_initialized, names: see `make_plan` and `measure`. "auto" leaves a site alone where
            nothing is to be gained, see `indicator`; the plan's is "none" where that holds for all.
        tolerance: end each pass once its sigmas, or the BatchNorms that it re-estimates, are known this well, see
            `measure` and `estimate_norms`: 0.05 is the command's. 0 for all batches, which need no random order then.
        optimizer: what the network will be trained with: by it "auto" tells whether something is to be gained.
        found: the sites to equalize; by default all resampled ones.
        keep: called with what each pass over the images measured, which then has histograms and statistics too.

    Raises:
        NumericsError: at the first non-finite value. SiteError: for an unknown strategy, no images, an attached
            network, or weights to rescale that an earlier call rewrote.
    """
    start = time.perf_counter()
    model = unwrapped(model)
    demand_folded(model)
    batches = list(batches) if isinstance(batches, Iterator) else batches
    found = found or scan(model, _first(batches))
    undecided = choose(found.sites, strategy, seed, newly_initialized)
    demand_not_rewritten(model, (each.site.weight for each in undecided if each.strategy == "rescale"))
    with undone_on_failure(model) as before:
        measured, decided, edits = _stage_by_stage(
            *(model, undecided, batches, before),
            found=found,
            scale=scale,
            optimizer=optimizer,
            tolerance=tolerance,
            names=names,
            keep=keep,
        )
    remember_rewritten(model, edits)
    planned = {site.layer: site for decision in decided for site in decision.sites}
    sites = tuple(planned[each.layer] for each in found.sites if each.layer in planned)
    if not any(site.changes_function for site in sites):
        edits = _without_estimates(edits, before, model)
    return Plan(
        strategy="none" if {site.strategy for site in sites} == {"none"} else strategy,
        seed=seed,
        scale=scale,
        sites=sites,
        refusals=(*found.refusals, *(refusal for decision in decided for refusal in decision.refusals)),
        edits=with_aliases(_without_superseded(edits), model),
        facts={"seconds": round(time.perf_counter() - start, 3), **_facts(measured, tolerance)},
    )


def _without_estimates(edits: Sequence[Edit], before: Mapping[str, Tensor], model: nn.Module) -> list[Edit]:
    """Where no site changes the function, nothing else may change it either: puts re-estimated BatchNorms back."""
    estimated = {edit.tensor for edit in edits if isinstance(edit, Set)}
    put_back({key: value for key, value in before.items() if key in estimated}, model)
    return [edit for edit in edits if not isinstance(edit, Set)]


def _stage_by_stage(
    model: nn.Module,
    undecided: list[Choice],
    batches: Iterable[Batch] | Blocks,
    before: dict[str, Tensor],
    *,
    found: Scan,
    scale: ScaleTo,
    optimizer: Optimizer,
    tolerance: float,
    names: Sequence[str],
    keep: Callable[[Measurement], None] | None,
) -> tuple[list[Measurement], list[Decision], list[Edit]]:
    """Measures, decides on and rewrites the sites, and re-estimates the BatchNorms behind them, a stage at a time.

    BatchNorms that never saw data are estimated as well, once what stands before them is as it will be saved.
    """
    measured: list[Measurement] = []
    decided: list[Decision] = []
    precision: Any = {"tolerance": tolerance, "names": names}
    measure: Callable[..., Measurement] = partial(
        measure_branches, model, batches=batches, histograms=keep is not None, **precision
    )
    estimate: Callable[..., list[Edit]] = partial(
        re_estimate, model, batches=batches, found=found, before=before, **precision
    )
    fresh = untouched_norms(model) if any(choice.changes_function for choice in undecided) else []
    estimated = norms_behind([], undecided, fresh)
    edits = estimate(estimated)
    for stage in stages(undecided):
        asked = any(each.may_leave for each in stage)
        measured.append(measure([each.site for each in stage], statistics=asked or keep is not None))
        if keep is not None:
            keep(measured[-1])
        statistics = measured[-1].statistics if asked else {}  # a plan does not depend on what else is kept
        decided.append(decide(model, stage, measured[-1].moments, statistics, scale=scale, optimizer=optimizer))
        apply_edits(decided[-1].edits, model, before)
        undecided = [each for each in undecided if each not in stage]
        behind = norms_behind([each for decision in decided for each in decision.choices], undecided, fresh)
        again = estimate([key for key in behind if key not in estimated])
        edits += [*decided[-1].edits, *again]
        estimated += behind
    return measured, decided, edits


def _first(batches: Iterable[Batch] | Blocks) -> Batch:
    if isinstance(batches, Blocks):
        batches = (batch for block in batches.read(0, 1) for batch in block.batches)
    first = next(iter(batches), None)
    if first is None:
        raise SiteError("batches", "hold no image", remedy="give at least one")
    return first


def _facts(measured: Sequence[Measurement], tolerance: float) -> Mapping[str, Any]:
    """The facts in the plan about its measurements."""
    shapes = measured[0].shapes if measured else ()
    return {
        "images": max((each.images for each in measured), default=0),
        "measured_by": measured[0].method if measured else None,
        "input_shape": [2, *shapes[0][1:]] if len(shapes) == 1 else None,
        "tolerance": tolerance,
        "converged": all(each.is_known(tolerance) for each in measured),
    }


def stages(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Sites that can be measured in one pass: as many rewritten levels lie before each."""
    changing = {choice.site.layer for choice in choices if choice.changes_function}
    level: dict[str, int] = {}
    for site in (choice.site for choice in choices):  # in graph order, so those upstream are known
        before = (level[layer] + (layer in changing) for layer in site.upstream if layer in level)
        level[site.layer] = max(before, default=0)
    return [[choice for choice in choices if level[choice.site.layer] == each] for each in sorted(set(level.values()))]


def norms_behind(done: Sequence[Choice], undecided: Sequence[Choice], fresh: Sequence[str] = ()) -> list[str]:
    """`running_mean` keys of BatchNorms that no later rewriting reaches, of `fresh` ones and those behind `done` sites
    that were rewritten.

    The others can wait: a site behind such a BatchNorm is measured after all rewriting in front of it.
    """
    later = {norm for choice in undecided if choice.changes_function for norm in choice.site.norms}
    reached = (norm for choice in done if choice.changes_function for norm in choice.site.norms)
    behind = dict.fromkeys((*fresh, *reached))
    return [norm for norm in behind if norm not in later]


def re_estimate(
    model: nn.Module,
    norms: Sequence[str],
    batches: Iterable[Batch] | Blocks,
    found: Scan,
    tolerance: float = 0.0,
    names: Sequence[str] = (),
    before: dict[str, Tensor] | None = None,
) -> list[Edit]:
    """Re-estimates BatchNorms, by `running_mean` key, each on what it will see, and writes that into the model.

    `before` is as of `apply_edits`.
    """
    values = estimate_norms(model, norms, batches, found.norms, tolerance=tolerance, names=names)
    edits: list[Edit] = [
        Set(tensor=key, values=tuple(value.cpu().double().flatten().tolist())) for key, value in values.items()
    ]
    apply_edits(edits, model, before)
    return edits


def _without_superseded(edits: Sequence[Edit]) -> list[Edit]:
    """The edits without those whose tensor is set anew later."""
    last = {edit.tensor: index for index, edit in enumerate(edits) if isinstance(edit, Set)}
    return [edit for index, edit in enumerate(edits) if index >= last.get(edit.tensor, -1)]
