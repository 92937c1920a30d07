"""Scans, plans and checks as Rich renderables, readable at 80 columns.

A fusion layer's name is on its own line and module paths are never cut, so that they can be copied.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import ConsoleRenderable
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from equalize.commands.scan import CheckpointScan
from equalize.messages import first_of
from equalize.moments.measure import CONVERGED
from equalize.moments.measured import Expectation, MeasuredSite
from equalize.plan.plan import MEANING, SCHEMA, Plan, PlannedSite
from equalize.sites.branches import Branch
from equalize.sites.refusals import Refusal
from equalize.sites.sites import Site
from equalize.verify.function import Check

__all__ = ["plan_report", "scan_report", "verification_json", "verification_report"]

_IMAGES = "images of the data"
_SHOWN = 5  # places of one refusal, and changed tensors; JSON has them all
_EXPECTATIONS: Mapping[Expectation, str] = {
    "gain": "expect a gain from equalizing",
    "nothing": "expect nothing from equalizing",
    "unclear": "cannot tell whether equalizing helps",
}


def scan_report(found: CheckpointScan, *, every: bool = False) -> Iterator[ConsoleRenderable]:
    """Fusion layers, how each branch was resampled and, if measured, its scale; refusals, with `every` all of them."""
    shape = "x".join(map(str, found.input_shape))
    method = "torch.export" if found.scan.tracer == "export" else "a recorded run"
    yield Text.assemble((found.source, "bold"), f": {found.family} {found.architecture}, read by {method} at {shape}")
    yield Text()
    for site in found.scan.sites:
        yield from _site_header(site)
        columns: dict[str, list[str]] = {}
        if isinstance(site, MeasuredSite):
            columns = {"mean": [f"{branch.mean:.3g}" for branch in site.branches], **_sigmas(site), **_shares(site)}
        yield _branch_table(site, columns)
        for branch in site.branches:
            if branch.fixed is not None:
                yield _indented(f"{branch.start}..{branch.stop} cannot migrate: {branch.fixed}", 4)
        if isinstance(site, MeasuredSite):
            yield _ratio(_quotient([branch.std for branch in site.branches]))
            yield _indented(f"{_expectation(site.expect, site.delta)}", 4, "bold")
        yield Text()
    yield Text(_count(found))
    if found.scan.sites and found.expect is not None:
        largest = ", the largest of its fusion layers" if found.delta is not None and len(found.scan.sites) > 1 else ""
        yield Text(f"This network: {_expectation(found.expect, found.delta)}{largest}.", style="bold")
    yield from _refusals(found.scan.refusals, every=every)


def plan_report(plan: Plan, compared_on: str = _IMAGES) -> Iterator[ConsoleRenderable]:
    """What was measured and changed, the verification, and what to do next."""
    yield Text()
    for site in plan.sites:
        before, after = [branch.std for branch in site.branches], _after(plan, site)
        yield from _site_header(site)
        yield _indented(_strategy(plan, site))
        yield _branch_table(site, {**_sigmas(site), "after": [f"{sigma:.3g}" for sigma in after]})
        yield _ratio(f"{_quotient(before)} before, {_quotient(after)} after")
        if site.delta is not None:
            yield _indented(_expectation(site.expect, site.delta), 4)
        yield Text()
    yield from _refusals(plan.refusals)
    if plan.sites and not plan.equalized:
        yield Text("Every fusion layer was left alone; a --strategy of your choice equalizes them all the same.")
    facts = plan.facts
    if "images" in facts:
        yield Text(_effort(facts))
    yield Text(_changes(plan))
    if facts.get("check"):
        yield from _proof(plan, facts["check"], facts.get("logit_range"), compared_on)
    if facts.get("output") is None:
        yield Text("Nothing was written (--dry-run).")
        return
    yield Text.assemble("Written: ", (str(facts["output"]), "bold"))
    yield from _loading(Path(facts["output"]))
    if any(site.strategy == "preserve" for site in plan.sites):
        method = f"equalize finetune {facts['output']} (or equalize.attach)"
        yield Text(f"Train it:  {method}, where preserve takes effect")


def verification_json(out: str, against: str, plan: Plan, check: Check) -> dict[str, Any]:
    """The object of `verify --json`; a check that fails raises before."""
    return {
        "schema": SCHEMA,
        "output": out,
        "against": against,
        "strategy": plan.strategy,
        "changed": list(plan.changed_on_disk),
        "check": check.to_json(),
    }


def verification_report(
    out: str, against: str, plan: Plan, check: Check, compared_on: str = _IMAGES
) -> Iterator[ConsoleRenderable]:
    """The result of a verification."""
    layers = ", ".join(f"{site.layer} ({site.strategy})" for site in plan.sites)
    yield Text.assemble((out, "bold"), f" is {against} with its plan carried out: {layers}.")
    yield Text(_changes(plan))
    yield from _proof(plan, check.to_json(), check.logit_range, compared_on)


def _indented(text: str, columns: int = 2, style: str = "") -> ConsoleRenderable:
    return Padding(Text(text, style=style), (0, 0, 0, columns), expand=False)


def _site_header(site: Site) -> Iterator[ConsoleRenderable]:
    kernel = " " + "x".join(map(str, site.kernel)) if site.kernel else ""
    groups = f", {site.groups} groups" if site.groups > 1 else ""
    kind = "" if site.kind == "resampled" else ", no branch resampled"
    yield Text(site.layer, style="bold")
    yield _indented(
        f"{site.op}{kernel}{groups} over {site.branches[-1].stop} channels, {len(site.branches)} branches{kind}"
    )


def _branch_table(site: Site, columns: Mapping[str, Sequence[str]]) -> ConsoleRenderable:
    """A row a branch; further columns by their heading."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="dim")
    table.add_column()  # indents
    for heading in ("channels", "resampling"):
        table.add_column(heading, no_wrap=True)
    for heading in columns:
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("source", no_wrap=True)  # last: where a terminal is too narrow, it is what gets wrapped
    for branch, *cells in zip(site.branches, *columns.values(), strict=True):
        channels = f"{branch.start}..{branch.stop}"
        table.add_row(*map(Text, ("", channels, _resampling(branch), *cells, branch.source or "input")))
    return table


def _resampling(branch: Branch) -> str:
    if branch.resampling is None:
        return "-"
    factors = [f"{factor:.3g}" for factor in branch.factor]
    return f"{branch.resampling} x{factors[0] if len(set(factors)) == 1 else 'x'.join(factors)}"


def _sigmas(site: MeasuredSite) -> dict[str, list[str]]:
    return {
        "sigma": [f"{branch.std:.3g}" for branch in site.branches],
        "95 %": ["" if branch.ci95 is None else f"± {branch.ci95:.1%}" for branch in site.branches],
    }


def _shares(site: MeasuredSite) -> dict[str, list[str]]:
    """Each branch's share of a step of the layer's output."""
    return {"step": ["" if each.step_share is None else f"{each.step_share:.1%}" for each in site.branches]}


def _expectation(expect: Expectation, delta: float | None) -> str:
    """A plain sentence on what equalizing would bring."""
    measured = "" if delta is None else f": delta {delta:.3f}"
    return f"{_EXPECTATIONS[expect]}{measured}"


def _ratio(quotients: str) -> ConsoleRenderable:
    return _indented(f"largest sigma / smallest: {quotients}", 4, "bold")


def _quotient(sigmas: Sequence[float]) -> str:
    return f"{max(sigmas) / min(sigmas):.2f}" if min(sigmas) > 0 else "infinite (a branch is constant)"


def _count(found: CheckpointScan) -> str:
    count, hidden = len(found.scan.sites), found.scan.unlisted
    listed = f"{count} fusion layer{'' if count == 1 else 's'}" if count else "No fusion layer of resampled branches"
    if count and found.images is not None:
        listed += f", measured on {_of_all(found.images, found.samples)} images{_by(found.measured_by)}"
    return f"{listed}; --all lists {hidden} more without a resampled branch." if hidden else f"{listed}."


def _refusals(refusals: Sequence[Refusal], *, every: bool = False) -> Iterator[ConsoleRenderable]:
    """One reason, then the places it holds for; of concats without a resampled branch the number, but for `every`."""
    listed = [refusal for refusal in refusals if every or not refusal.plain]
    if plain := len(refusals) - len(listed):
        concats = "concat" if plain == 1 else "concats"
        yield Text(f"{plain} {concats} without a resampled branch cannot be equalized; equalize scan --all says why.")
    if not listed:
        return
    yield Text(f"Cannot be equalized ({len(listed)}):")
    places: dict[str, list[str]] = {}
    for refusal in listed:
        places.setdefault(refusal.reason, []).append(refusal.at)
    for reason, at in places.items():
        yield _indented(f"{first_of(at, _SHOWN)}: {reason}")
    yield Text()


def _strategy(plan: Plan, site: PlannedSite) -> str:
    means = ""
    if site.strategy == "preserve" and plan.scaled_inputs(site):
        return "preserve: its weights follow a branch that another layer moved; in training, as preserve elsewhere"
    if site.changes_function:
        means = "; means taken out in its bias" if site.shift else "; the means stay"
    return f"{site.strategy}: {MEANING[site.strategy]}{means}"


def _after(plan: Plan, site: PlannedSite) -> list[float]:
    """The scale of each branch as the fusion weights, or the optimizer, see it from now on."""
    sigmas = [branch.std for branch in site.branches]
    if site.strategy == "none":
        return sigmas
    if site.strategy in ("preserve", "whiten"):
        return [site.tau] * len(sigmas)
    if site.strategy == "migrate":
        return [sigma / scale for sigma, scale in zip(sigmas, plan.input_scale(site), strict=True)]
    factors = plan.scaled_inputs(site)
    return [branch.std * factors[branch.start] for branch in site.branches]


def _effort(facts: Mapping[str, Any]) -> str:
    within = f"within {100 * (facts.get('tolerance') or CONVERGED):.3g} %"
    known = f"every sigma is known {within}"
    if not facts.get("converged"):
        known = f"it takes more --samples to know every sigma {within}"
    elif facts["images"] < facts.get("samples", 0):
        known = f"it stopped as {known}"
    images, by = _of_all(facts["images"], facts.get("samples", 0)), _by(facts.get("measured_by"))
    return f"Measured on {images} images{by} in {facts.get('seconds', 0):.1f} s; {known}."


def _of_all(images: int, samples: int) -> str:
    return f"{images} of {samples}" if images < samples else f"{images}"


def _by(way: str | None) -> str:
    return f" by {way}" if way else ""


def _changes(plan: Plan) -> str:
    if not plan.changed:
        return "Changed: no tensor."
    names = {key: f"{disk} (in the model {key})" for key, disk in plan.disk_keys.items()}
    keys = [names.get(key, key) for key in plan.changed]
    return f"Changed: {len(keys)} tensors ({first_of(keys, _SHOWN)}); all others kept every bit."


def _proof(
    plan: Plan, check: Mapping[str, float], logit_range: float | None, compared_on: str
) -> Iterator[ConsoleRenderable]:
    """`logit_range` is what a change of logits is held against; None in plans of earlier versions."""
    yield Text(f"Proof: loaded again by its own library and compared with the original on {compared_on}.")
    same = not any(site.changes_function for site in plan.sites)
    change = check["max_abs_change"]
    if not same:
        yield _indented(f"logits change by up to {change:.3g}{_of(change, logit_range)}, as meant")
    else:
        yield _indented(
            f"logits differ by at most {change:.2g}{_of(change, logit_range)}, which is rounding"
            if change
            else "logits: the same bits"
        )
    against = "what they gave before" if same else "explicit equalizers in front of the layer"
    exact = all(site.exact_border for site in plan.sites)
    why = "" if same else ", which is padded with zeros, not means"
    border = "" if exact else f" inside, {check['border']:.1e} on the border{why}"
    yield _indented(f"fusion layers against {against}, relative to their range: {check['interior']:.1e}{border}")


def _of(change: float, logit_range: float | None) -> str:
    if not logit_range:
        return ""
    size = f"{logit_range:,.0f}" if logit_range >= 100 else f"{logit_range:.3g}"
    return f" of a range of {size} ({change / logit_range:.1e})"


def _loading(out: Path) -> Iterator[ConsoleRenderable]:
    """The lines of Python that load what was written with its own library."""
    from equalize.checkpoint.load import written_by  # imports torch, which the reported work has imported anyway

    yield Text("Load it:")
    for line in written_by(out).loading_code(out).splitlines():
        if line:
            yield _indented(line)
