"""Surveys, plans and checks as text for people: Rich renderables, readable at 80 columns.

A fusion layer's name stands on a line of its own and module paths are never cut, so that they can be copied.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import ConsoleRenderable
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from equalize.commands.scan import CheckpointScan
from equalize.moments.measured import MeasuredSite
from equalize.plan.plan import SCHEMA, Plan, PlannedSite
from equalize.sites.branches import Branch
from equalize.sites.refusals import Refusal
from equalize.sites.sites import Site
from equalize.verify.function import Check

__all__ = ["plan_report", "scan_report", "verification_json", "verification_report"]

_IMAGES = "images of the data"
_SHOWN = 5  # places of one refusal, and changed tensors; JSON has them all

_MEANING = {
    "migrate": "scale moved from the branches into the fusion weights; the network computes the same",
    "preserve": "nothing changes on disk; in training, equalize.attach shows the optimiser branches of scale 1",
    "rescale": "fusion weights divided by each sigma: they act on branches of scale 1",
    "reinit": "fusion weights drawn anew, then divided by each sigma: they act on branches of scale 1",
}
_SHIFT = {"bias": "means taken out in its bias", "running_mean": "means taken out in the norm behind it"}


def scan_report(found: CheckpointScan) -> list[ConsoleRenderable]:
    """What a network fuses, how each branch was resampled and, once measured, its scale."""
    scan = found.scan
    shape = "x".join(map(str, found.input_shape))
    how = "torch.export" if scan.tracer == "export" else "a recorded run"
    parts: list[ConsoleRenderable] = [
        Text.assemble((found.source, "bold"), f": {found.family} {found.architecture}, read by {how} at {shape}"),
        Text(),
    ]
    for site in scan.sites:
        parts += [*_site_header(site), _branch_table(site, _measured_columns(site))]
        parts += [*_stays(site), *_ratio(site), Text()]
    parts.append(Text(_count(found)))
    parts += _refusals(scan.refusals)
    return parts


def plan_report(plan: Plan, compared_on: str = _IMAGES) -> list[ConsoleRenderable]:
    """What was measured, what changed, what was proven, and what to do next."""
    parts: list[ConsoleRenderable] = [Text()]
    for site in plan.sites:
        parts += [*_site_header(site), _indented(_strategy(plan, site))]
        parts += [_branch_table(site, _plan_columns(plan, site)), *_ratio_after(plan, site), Text()]
    parts += _refusals(plan.refusals)
    facts = plan.facts
    if not plan.sites:
        parts.append(Text("No fusion layer was equalized, for the reasons above; nothing was written."))
        return parts
    parts.append(Text(_effort(facts)))
    parts.append(Text(_changes(plan)))
    if facts.get("check"):
        parts += _proof(plan, facts["check"], compared_on)
    if facts.get("output") is None:
        parts.append(Text("Nothing was written (--dry-run)."))
    else:
        parts += [Text.assemble("Written: ", (str(facts["output"]), "bold")), *_loading(Path(facts["output"]))]
        if any(site.strategy == "preserve" for site in plan.sites):
            how = f"equalize finetune {facts['output']} (or equalize.attach)"
            parts.append(Text(f"Train it:  {how}, where preserve takes effect"))
    return parts


def verification_json(out: str, against: str, plan: Plan, check: Check) -> dict[str, Any]:
    """The object of `verify --json`; a check that fails raises before."""
    return {
        "schema": SCHEMA,
        "output": out,
        "against": against,
        "strategy": plan.strategy,
        "changed": list(plan.changed),
        "check": check.to_json(),
    }


def verification_report(
    out: str, against: str, plan: Plan, check: Check, compared_on: str = _IMAGES
) -> list[ConsoleRenderable]:
    """What was proven."""
    layers = ", ".join(f"{site.layer} ({site.strategy})" for site in plan.sites)
    return [
        Text.assemble((out, "bold"), f" is {against} with its plan carried out: {layers}."),
        Text(_changes(plan)),
        *_proof(plan, check.to_json(), compared_on),
    ]


def _indented(text: str, columns: int = 2, style: str = "") -> ConsoleRenderable:
    return Padding(Text(text, style=style), (0, 0, 0, columns), expand=False)


def _site_header(site: Site) -> list[ConsoleRenderable]:
    kernel = " " + "x".join(map(str, site.kernel)) if site.kernel else ""
    groups = f", {site.groups} groups" if site.groups > 1 else ""
    kind = "" if site.kind == "resampled" else ", no branch resampled"
    facts = f"{site.op}{kernel}{groups} over {site.branches[-1].stop} channels, {len(site.branches)} branches{kind}"
    return [Text(site.layer, style="bold"), _indented(facts)]


Columns = Mapping[str, Sequence[str]]
"""Further columns of a branch table: heading -> a cell a branch."""


def _branch_table(site: Site, columns: Columns) -> ConsoleRenderable:
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="dim")
    table.add_column()  # indents
    for heading in ("channels", "resampling"):
        table.add_column(heading, no_wrap=True)
    for heading in columns:
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("source", no_wrap=True)  # last: where a terminal is too narrow, it is what gets wrapped
    for index, branch in enumerate(site.branches):
        cells = ["", f"{branch.start}..{branch.stop}", _resampling(branch)]
        table.add_row(*map(Text, (*cells, *(column[index] for column in columns.values()), branch.source or "input")))
    return table


def _resampling(branch: Branch) -> str:
    if branch.resampling is None:
        return "-"
    factors = [f"{factor:.3g}" for factor in branch.factor]
    return f"{branch.resampling} x{factors[0] if len(set(factors)) == 1 else 'x'.join(factors)}"


def _measured_columns(site: Site) -> Columns:
    if not isinstance(site, MeasuredSite):
        return {}
    return {
        "mean": [f"{branch.mean:.3g}" for branch in site.branches],
        "sigma": [f"{branch.std:.3g}" for branch in site.branches],
        "95 %": ["" if branch.ci95 is None else f"± {branch.ci95:.1%}" for branch in site.branches],
    }


def _stays(site: Site) -> list[ConsoleRenderable]:
    """Which branches `migrate` could not rescale, and why."""
    return [
        _indented(f"{branch.start}..{branch.stop} cannot migrate: {branch.fixed}", 4)
        for branch in site.branches
        if branch.fixed is not None
    ]


def _ratio(site: Site) -> list[ConsoleRenderable]:
    if not isinstance(site, MeasuredSite):
        return []
    return [_indented(f"largest sigma / smallest: {_quotient([branch.std for branch in site.branches])}", 4, "bold")]


def _quotient(sigmas: Sequence[float]) -> str:
    return f"{max(sigmas) / min(sigmas):.2f}" if min(sigmas) > 0 else "infinite (a branch is constant)"


def _count(found: CheckpointScan) -> str:
    count, hidden = len(found.scan.sites), found.scan.unlisted
    listed = f"{count} fusion layer{'' if count == 1 else 's'}" if count else "No fusion layer of resampled branches"
    images = (
        f", measured on {found.images} images{_by(found.measured_by)}" if found.images is not None and count else ""
    )
    more = f"; --all lists {hidden} more without a resampled branch" if hidden else ""
    return f"{listed}{images if count else ''}{more}."


def _refusals(refusals: Sequence[Refusal]) -> list[ConsoleRenderable]:
    """One reason, then the places it holds for."""
    if not refusals:
        return []
    places: dict[str, list[str]] = {}
    for refusal in refusals:
        places.setdefault(refusal.reason, []).append(refusal.at)
    parts: list[ConsoleRenderable] = [Text(f"Cannot be equalized ({len(refusals)}):")]
    for reason, at in places.items():
        more = f" and {len(at) - _SHOWN} more (--json names them)" if len(at) > _SHOWN else ""
        parts.append(_indented(f"{', '.join(at[:_SHOWN])}{more}: {reason}"))
    return [*parts, Text()]


def _strategy(plan: Plan, site: PlannedSite) -> str:
    shift = ""
    if site.changes_function:
        shift = f"; {_SHIFT[site.shift]}" if site.shift else "; scale only, the means have nowhere to go"
        shift += ", norm of the weight kept" if plan.keep_norm else ""
    return f"{site.strategy}: {_MEANING[site.strategy]}{shift}"


def _after(plan: Plan, site: PlannedSite) -> list[float]:
    """The scale of each branch as the fusion weights, or the optimiser, see it from now on."""
    sigmas = [branch.std for branch in site.branches]
    if site.strategy == "preserve":
        return [1.0] * len(sigmas)
    if site.strategy == "migrate":
        return [sigma / scale for sigma, scale in zip(sigmas, plan.input_scale(site), strict=True)]
    factors = plan.scaled_inputs(site)
    return [branch.std * factors[branch.start] for branch in site.branches]


def _plan_columns(plan: Plan, site: PlannedSite) -> Columns:
    after = _after(plan, site)
    return {
        "sigma": [f"{branch.std:.3g}" for branch in site.branches],
        "95 %": ["" if branch.ci95 is None else f"± {branch.ci95:.1%}" for branch in site.branches],
        "after": [f"{sigma:.3g}" for sigma in after],
    }


def _ratio_after(plan: Plan, site: PlannedSite) -> list[ConsoleRenderable]:
    before = _quotient([branch.std for branch in site.branches])
    after = _quotient(_after(plan, site))
    return [_indented(f"largest sigma / smallest: {before} before, {after} after", 4, "bold")]


def _effort(facts: Mapping[str, Any]) -> str:
    if "images" not in facts:
        return ""
    known = "every sigma is known well enough" if facts.get("converged") else "more --samples would make sigma surer"
    by = _by(facts.get("measured_by"))
    return f"Measured on {facts['images']} images{by} in {facts.get('seconds', 0):.1f} s; {known}."


def _by(way: str | None) -> str:
    return f" by {way}" if way else ""


def _changes(plan: Plan) -> str:
    keys = plan.changed
    if not keys:
        return "Changed: no tensor."
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"Changed: {len(keys)} tensors ({', '.join(keys[:_SHOWN])}{more}); all others kept every bit."


def _proof(plan: Plan, check: Mapping[str, float], compared_on: str) -> list[ConsoleRenderable]:
    same = all(site.strategy in ("migrate", "preserve") for site in plan.sites)
    change = check["max_abs_change"]
    if not same:
        logits = f"logits change by up to {change:.3g}, as meant"
    else:
        logits = f"logits differ by at most {change:.2g}, which is rounding" if change else "logits: the same bits"
    against = "what they gave before" if same else "explicit equalizers in front of the layer"
    exact = all(site.exact_border for site in plan.sites)
    why = "" if same else ", which is padded with zeros, not means"
    border = "" if exact else f" inside, {check['border']:.1e} on the border{why}"
    return [
        Text(f"Proof: loaded again by its own library and compared with the original on {compared_on}."),
        _indented(logits),
        _indented(f"fusion layers against {against}, relative to their range: {check['interior']:.1e}{border}"),
    ]


def _loading(out: Path) -> list[ConsoleRenderable]:
    """The lines of Python that load what was written, where its format is at home."""
    from equalize.checkpoint.load import written_by  # brings torch, which the work that is reported has needed

    code = written_by(out).loading_code(out)
    return [Text("Load it:"), *(_indented(line) for line in code.splitlines() if line)]
