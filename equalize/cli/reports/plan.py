"""Scans, plans and checks as Rich renderables, readable at 80 columns.

A fusion layer's name is on its own line and module paths are never cut, so that they can be copied.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import ConsoleRenderable
from rich.table import Table
from rich.text import Text

from equalize.checkpoint.written import written_by
from equalize.cli.tables import indented, report_table
from equalize.commands.report.words import (
    OPTIMIZERS,
    changes_of,
    effort_of,
    expectation,
    measured_by,
    of_all,
    proof_of,
    ratio_of,
    sigmas_after,
    strategy_of,
)
from equalize.commands.scan import CheckpointScan
from equalize.commands.verify_trained import TrainedCheck
from equalize.messages import counted, first_of
from equalize.moments.measured import MeasuredSite
from equalize.plan.plan import SCHEMA, Plan
from equalize.sites.refusals import Refusal
from equalize.sites.sites import Site
from equalize.verify.function import Check

_IMAGES = "images of the data"
_SHOWN = 5  # places of one refusal; JSON has them all
_LEGEND = (
    "sigma: standard deviation of a branch's values, 95 %: its interval; step: the branch's share of a training step; "
    "delta: how much more 100 steps of {optimizer} would explain from zero of what is to be learned, were the branches "
    "of one scale; longer trainings may gain less or lose, which equalize compare measures."
)
_TRAINED = (
    "Trained fusion weights may gain by equalization or, fine-tuned for long, lose; equalize compare measures it."
)
_BAR = 10  # characters of the largest sigma's bar


def scan_report(found: CheckpointScan, *, every: bool = False) -> Iterator[ConsoleRenderable]:
    """Fusion layers, how each branch was resampled and, if measured, its scale; refusals, with `every` all of them."""
    shape = "x".join(map(str, found.input_shape))
    by = {"export": "torch.export", "recorder": "a recorded run" if found.scan.ran else "a recording on fake tensors"}
    method = by[found.scan.tracer]
    yield Text.assemble((found.source, "bold"), f": {found.family} {found.architecture}, read by {method} at {shape}")
    yield Text()
    for site in found.scan.sites:
        yield from _site_header(site)
        columns: dict[str, list[str]] = {}
        if isinstance(site, MeasuredSite):
            shares = ["" if each.step_share is None else f"{each.step_share:.1%}" for each in site.branches]
            columns = {"mean": [f"{branch.mean:.3g}" for branch in site.branches], **_sigmas(site), "step": shares}
        yield _branch_table(site, columns)
        for branch in site.branches:
            if branch.fixed is not None:
                yield indented(f"{branch.start}..{branch.stop} keeps its scale under migrate: {branch.fixed}", 4)
        if isinstance(site, MeasuredSite):
            yield _ratio(ratio_of([branch.std for branch in site.branches]))
            yield indented(expectation(site.expect, site.delta), 4, "bold")
        yield Text()
    yield Text(_count(found))
    if found.scan.sites and found.images is not None:
        yield Text(_LEGEND.format(optimizer=OPTIMIZERS[found.optimizer]))
    if found.scan.sites and found.expect is not None:
        largest = ", the largest of its fusion layers" if found.delta is not None and len(found.scan.sites) > 1 else ""
        yield Text(f"This network: {expectation(found.expect, found.delta)}{largest}.", style="bold")
    if found.missing:
        parts = first_of(list(dict.fromkeys(key.partition(".")[0] for key in found.missing)))
        yield Text(f"Missing in the checkpoint, as in an encoder alone: {parts} ({len(found.missing)} tensors).")
        yield indented("--init-missing --num-classes N draws it for N classes, and calibrate equalizes what was drawn.")
    yield from _refusals(found.scan.refusals, every=every)


def plan_report(plan: Plan, compared_on: str = _IMAGES) -> Iterator[ConsoleRenderable]:
    """What was measured and changed, the verification, and what to do next."""
    yield Text()
    for site in plan.sites:
        before, after = [branch.std for branch in site.branches], sigmas_after(plan, site)
        yield from _site_header(site)
        yield indented(strategy_of(plan, site))
        yield _branch_table(site, {**_sigmas(site), "after": [f"{sigma:.3g}" for sigma in after]})
        yield _ratio(f"{ratio_of(before)} before, {ratio_of(after)} after")
        if site.delta is not None:
            yield indented(expectation(site.expect, site.delta), 4)
        yield Text()
    yield from _refusals(plan.refusals)
    if plan.sites and not plan.equalized:
        yield Text("Every fusion layer was left alone; a --strategy of your choice equalizes them all the same.")
    facts = plan.facts
    if "images" in facts:
        yield Text(effort_of(facts))
    yield Text(changes_of(plan))
    if any(not site.changes_function for site in plan.equalized):
        yield Text(_TRAINED)
    if facts.get("check"):
        yield from _proof(plan, facts["check"], facts["logit_range"], compared_on)
    if facts.get("output") is None:
        yield Text("Nothing was written (--dry-run).")
        return
    yield Text.assemble("Written: ", (str(facts["output"]), "bold"))
    yield from _loading(Path(facts["output"]))
    if any(site.strategy == "preserve" for site in plan.sites):
        method = f"equalize finetune {facts['output']} (or equalize.attach in your own loop)"
        yield Text(f"Train it:  {method}, where preserve takes effect")


def verification_json(
    out: str, against: str, plan: Plan, check: Check | None = None, trained: TrainedCheck | None = None
) -> dict[str, Any]:
    """The object of `verify --json`; a check that fails raises before. Of a trained model "check" is null."""
    return {
        "schema": SCHEMA,
        "output": out,
        "against": against,
        "strategy": plan.strategy,
        "changed": list(plan.changed_on_disk),
        "check": check and check.to_json(),
        **({"trained": trained.to_json()} if trained else {}),
    }


def verification_report(
    out: str, against: str, plan: Plan, check: Check, compared_on: str = _IMAGES
) -> Iterator[ConsoleRenderable]:
    """The result of a verification."""
    layers = ", ".join(f"{site.layer} ({site.strategy})" for site in plan.sites)
    yield Text.assemble((out, "bold"), f" is {against} with its plan carried out: {layers}.")
    yield Text(changes_of(plan))
    yield from _proof(plan, check.to_json(), check.logit_range, compared_on)


def trained_report(out: str, against: str, plan: Plan, found: TrainedCheck) -> Iterator[ConsoleRenderable]:
    """The result of verifying a model that was trained since it was calibrated."""
    step = "" if found.step is None else f", to step {found.step}"
    yield Text.assemble((out, "bold"), f" was trained after it was calibrated (from {found.source}{step}).")
    yield Text(
        "Its weights differ from the plan's because of the training, so the proof of calibration does not apply to it."
    )
    yield Text("What can be checked holds:")
    roles = {"calibrated": "was calibrated", "trained": "the training started from"}
    made_of = ", and that ".join(roles[role] for role in found.role.split(" and "))
    yield indented(f"{against} is the model that {made_of}: its weights have the recorded sha256")
    classes = f", but for the number of classes in {first_of(found.new_classifier)}" if found.new_classifier else ""
    yield indented(f"the same {found.tensors} tensors in the same shapes{classes}; training changed {found.changed}")
    yield indented("its own library loads it, and every value is finite")
    if "calibrated" in found.role and found.source != plan.facts.get("source"):
        yield Text(f"The proof of the calibration itself: equalize verify {found.source} --against {against}")


def _site_header(site: Site) -> Iterator[ConsoleRenderable]:
    kernel = " " + "x".join(map(str, site.kernel)) if site.kernel else ""
    groups = f", {site.groups} groups" if site.groups > 1 else ""
    kind = "" if site.kind == "resampled" else ", no branch resampled"
    yield Text(site.layer, style="bold")
    yield indented(
        f"{site.op}{kernel}{groups} over {site.branches[-1].stop} channels, {len(site.branches)} branches{kind}"
    )


def _branch_table(site: Site, columns: Mapping[str, Sequence[str]]) -> Table:
    """A row a branch, with further columns by their heading."""
    table = report_table("channels", "resampling", *columns, "source", left=("channels", "resampling", "", "source"))
    for branch, *row in zip(site.branches, *columns.values(), strict=True):
        cells = ("", f"{branch.start}..{branch.stop}", branch.resampled or "-", *row, branch.source or "input")
        table.add_row(*map(Text, cells))
    return table


def _bar(share: float) -> str:
    """A bar of block characters, the longest for a share of 1."""
    eighths = round(share * _BAR * 8)
    return "\N{FULL BLOCK}" * (eighths // 8) + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8].strip()


def _sigmas(site: MeasuredSite) -> dict[str, list[str]]:
    largest = max(branch.std for branch in site.branches) or 1.0
    return {
        "sigma": [f"{branch.std:.3g}" for branch in site.branches],
        "95 %": ["" if branch.ci95 is None else f"± {branch.ci95:.1%}" for branch in site.branches],
        "": [_bar(branch.std / largest) for branch in site.branches],
    }


def _ratio(quotients: str) -> ConsoleRenderable:
    return indented(f"largest sigma / smallest: {quotients}", 4, "bold")


def _count(found: CheckpointScan) -> str:
    count, hidden = len(found.scan.sites), found.scan.unlisted
    listed = counted(count, "fusion layer") if count else "No fusion layer of resampled branches"
    if count and found.images is not None:
        listed += f", measured on {of_all(found.images, found.samples)} images{measured_by(found.measured_by)}"
    return f"{listed}; --all lists {hidden} more without a resampled branch." if hidden else f"{listed}."


def _refusals(refusals: Sequence[Refusal], *, every: bool = False) -> Iterator[ConsoleRenderable]:
    """One reason, then the places it holds for; of concats without a resampled branch the number, but for `every`."""
    listed = [refusal for refusal in refusals if every or not refusal.plain]
    if plain := len(refusals) - len(listed):
        concats = counted(plain, "concat")
        yield Text(f"{concats} without a resampled branch cannot be equalized; equalize scan --all says why.")
    if not listed:
        return
    yield Text(f"Cannot be equalized ({len(listed)}):")
    places: dict[str, list[str]] = {}
    for refusal in listed:
        places.setdefault(refusal.reason, []).append(refusal.at)
    for reason, at in places.items():
        yield indented(f"{first_of(at, _SHOWN)}: {reason}")
    yield Text()


def _proof(plan: Plan, check: Mapping[str, float], logit_range: float, compared_on: str) -> Iterator[ConsoleRenderable]:
    heading, *lines = proof_of(plan, check, logit_range, compared_on)
    yield Text(heading)
    yield from map(indented, lines)


def _loading(out: Path) -> Iterator[ConsoleRenderable]:
    """The lines of Python that load what was written with its own library."""
    yield Text("Load it:")
    yield from (indented(line) for line in written_by(out).loading_code(out).splitlines() if line)
