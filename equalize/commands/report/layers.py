"""Pages of measured fusion layers: what a scan found, and what a calibration changed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equalize.commands.report.page import Section, Table
from equalize.commands.report.sites import DrawnSite, draw_branches, draw_layer
from equalize.commands.report.words import (
    OPTIMIZERS,
    effort_of,
    expectation,
    measured_by,
    proof_of,
    ratio_of,
    rounded,
    sigmas_after,
    strategy_of,
)
from equalize.messages import counted
from equalize.moments.histograms import BINS
from equalize.moments.measured import MeasuredSite, sigma_rms
from equalize.plan.edits import Add, Draw, Edit, Scale, ScaleInputs, Set
from equalize.plan.indicator import GAIN, NOTHING, STEPS, Optimizer, expected_of_all
from equalize.plan.plan import Plan, PlannedSite
from equalize.sites.refusals import Refusal

if TYPE_CHECKING:
    from equalize.commands.scan import CheckpointScan

_MOST_TENSORS = 60  # rows of a table
_DELTA = (
    f"Delta is how much more of what is to be learned, the variance of the labels, {STEPS} steps of {{optimizer}} "
    "explain once the branches are of one scale; without labels, of targets that lie in every branch alike. From "
    f"{GAIN:g} on a gain is expected, below {NOTHING:g} nothing, if both halves of the images agree. "
    "It speaks of a layer that starts from zero, not of one that is trained already."
)
_FIGURES = (
    "Sigma is the standard deviation of all values of a branch as they enter the layer, and whiskers "
    "are its 95 % interval over images; the share of a step is how much of what a training step changes at the layer's "
    "output comes through the branch; dashed lines are what both come to afterwards."
)
_VALUES = (
    "Values are those at {positions} positions of each image; the height of a curve is the square root of the density, "
    "each to its own scale, and an upright line stands for values that are exactly 0."
)


def scan_page(found: "CheckpointScan", onward: str) -> Iterator[Section]:
    """The sections of a page for a scan whose sites were measured."""
    sites = [site for site in found.scan.sites if isinstance(site, MeasuredSite)]
    layers = [
        DrawnSite(
            number=number,
            site=site,
            after=(sigma_rms(site.branches),) * len(site.branches),
            histograms_BK=found.histograms.get(site.layer, torch.empty(0, BINS)),
        )
        for number, site in enumerate(sites, 1)
    ]
    read = f"{found.family} {found.architecture}, read at {'x'.join(map(str, found.input_shape))}."
    measured = f"Measured on {found.images} images{measured_by(found.measured_by)}."
    verdict = "No fusion layer of resampled branches."
    if sites:
        verdict = _sentence(expectation(*expected_of_all(sites)))
    yield _overview(verdict, (read, measured) if sites else (read,), layers, found.optimizer)
    yield from (_section(each, says_expectation=len(layers) > 1) for each in layers)  # of one the verdict says it
    yield from _refused(found.scan.refusals)
    yield from _guide(layers, found.images or 0)
    if onward:
        yield Section(heading="Next", code=onward.removeprefix("next: "))


def calibration_page(
    plan: Plan, sites: Sequence[MeasuredSite], histograms: Mapping[str, Tensor], onward: str
) -> Iterator[Section]:
    """The sections of a page for a plan, and its sites with what is to be expected of each."""
    layers = [
        DrawnSite(
            number=number,
            site=site,
            after=tuple(sigmas_after(plan, planned)),
            histograms_BK=histograms.get(site.layer, torch.empty(0, BINS)),
            strategy=planned.strategy,
        )
        for number, (site, planned) in enumerate(zip(sites, plan.sites, strict=True), 1)
    ]
    facts = plan.facts
    done = len(plan.equalized)
    verdict = f"{done} of {counted(len(plan.sites), 'fusion layer')} equalized."
    if plan.sites and not done:
        verdict = "Every fusion layer was left alone: nothing is to be gained."
    lines = (f"{facts['family']} {facts['architecture']} from {facts['source']}.", effort_of(facts))
    written = f"Written: {facts['output']}" if facts.get("output") else "Nothing was written (--dry-run)."
    yield _overview(verdict, (*lines, written), layers, facts["optimizer"])
    yield from (_section(each, _what_is_done(plan, site)) for each, site in zip(layers, plan.sites, strict=True))
    yield _changed(plan)
    if facts.get("check"):
        heading, *lines_of_proof = proof_of(plan, facts["check"], facts["logit_range"], "images of the data")
        sentences = tuple(map(_sentence, lines_of_proof))
        yield Section(heading="Proof", paragraphs=(heading.removeprefix("Proof: ").capitalize(), *sentences))
    yield from _refused(plan.refusals)
    yield from _guide(layers, facts.get("images", 0))
    if onward:
        yield Section(heading="Next", code=onward.removeprefix("next: "))


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _overview(verdict: str, lines: Sequence[str], layers: Sequence[DrawnSite], optimizer: Optimizer) -> Section:
    planned = any(layer.strategy for layer in layers)
    header = ("fusion layer", "branches", "sigma, largest / smallest", *(["afterwards", "strategy"] if planned else []))
    rows = [
        (
            layer.site.layer,
            str(len(layer.site.branches)),
            ratio_of([branch.std for branch in layer.site.branches]),
            *([ratio_of(layer.after), layer.strategy] if planned else []),
            "-" if layer.site.delta is None else rounded(layer.site.delta),
            {"gain": "a gain", "nothing": "nothing", "unclear": "cannot tell"}[layer.site.expect],
        )
        for layer in layers
    ]
    table = Table(header=(*header, "delta", "expect"), rows=tuple(rows)) if rows else None
    explained = [_DELTA.format(optimizer=OPTIMIZERS[optimizer])] if rows else []
    return Section(heading="Result", verdict=verdict, paragraphs=(*lines, *explained), table=table)


def _guide(layers: Sequence[DrawnSite], images: int) -> Iterator[Section]:
    """How to read the figures."""
    paragraphs = [_FIGURES]
    sampled = next((layer for layer in layers if len(layer.histograms_BK)), None)
    if sampled is not None:
        values_an_image = int(sampled.histograms_BK.sum()) / max(images, 1)
        paragraphs.append(_VALUES.format(positions=round(values_an_image / sampled.site.branches[-1].stop)))
    if layers:
        yield Section(heading="How to read the figures", paragraphs=tuple(paragraphs))


def _what_is_done(plan: Plan, site: PlannedSite) -> Iterator[str]:
    yield _sentence(strategy_of(plan, site))
    for each in site.branches:
        if each.fixed:
            yield f"Channels {each.start}..{each.stop} keep their scale under migrate: {each.fixed}."


def _section(layer: DrawnSite, paragraphs: Iterable[str] = (), *, says_expectation: bool = True) -> Section:
    """A fusion layer: what to expect, its drawing, its branches, and their numbers."""
    site = layer.site
    return Section(
        heading=site.layer,
        verdict=_sentence(expectation(site.expect, site.delta)) if says_expectation else "",
        paragraphs=tuple(paragraphs),
        pictures=(draw_layer(layer), draw_branches(layer)),
        table=_numbers(layer),
    )


def _numbers(layer: DrawnSite) -> Table:
    rows = tuple(
        (
            branch.source or "input",
            f"{branch.start}..{branch.stop}",
            branch.resampled or "-",
            f"{branch.mean:.3g}",
            f"{branch.std:.3g}",
            "-" if branch.ci95 is None else f"± {branch.ci95:.1%}",
            f"{sigma:.3g}",
            "-" if branch.step_share is None else f"{branch.step_share:.1%}",
        )
        for branch, sigma in zip(layer.site.branches, layer.after, strict=True)
    )
    after = "afterwards" if layer.strategy else "equalized"
    header = ("branch", "channels", "resampling", "mean", "sigma", "95 %", after, "step share")
    return Table(header=header, rows=rows)


def _changed(plan: Plan) -> Section:
    """What was done to each tensor, by its key in the files."""
    done: dict[str, list[str]] = {}
    for edit in plan.edits:
        done.setdefault(plan.disk_keys.get(edit.tensor, edit.tensor), []).append(_deed(edit))
    if not done:
        return Section(heading="What was changed", paragraphs=("No tensor: every one keeps all its bits.",))
    rows = tuple((key, "; ".join(deeds)) for key, deeds in done.items())
    said = [f"{len(plan.changed)} tensors; all others kept every bit."]
    if len(rows) > _MOST_TENSORS:
        said.append(f"The first {_MOST_TENSORS} of them; equalize.json has them all.")
    table = Table(header=("tensor", "what was done"), rows=rows[:_MOST_TENSORS], prose=True)
    return Section(heading="What was changed", paragraphs=tuple(said), table=table)


def _deed(edit: Edit) -> str:
    match edit:
        case ScaleInputs(start=start, stop=stop, factor=factor):
            return f"inputs {start}..{stop} times {factor:.3g}"
        case Scale(factor=factor):
            return f"times {factor:.3g}"
        case Draw(seed=seed):
            return f"drawn anew under seed {seed}"
        case Add():
            return "the response to the means taken out"
        case Set():
            return "estimated on the images"
        case _:
            return edit.action


def _refused(refusals: Sequence[Refusal]) -> Iterator[Section]:
    """Why concats are no fusion layers that can be equalized; nothing where there are none but those of an encoder."""
    listed = [refusal for refusal in refusals if not refusal.plain]
    said: list[str] = []
    if plain := len(refusals) - len(listed):
        said = [f"{counted(plain, 'concat')} without a resampled branch are not listed; equalize scan --all does."]
    if listed or said:
        rows = tuple((refusal.at or "model", refusal.reason) for refusal in listed)
        table = Table(header=("where", "why"), rows=rows, prose=True) if rows else None
        yield Section(heading="Cannot be equalized", paragraphs=tuple(said), table=table)
