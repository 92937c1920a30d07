"""`equalize calibrate`: a checkpoint and images in, a checkpoint with scale equalization out.

Measures, embeds, writes, reloads and verifies.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.files.atomic import check_target, demand_apart
from equalize.checkpoint.loading import ModelName
from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.images import Images, open_images
from equalize.commands.input_check import check_input
from equalize.commands.report.layers import calibration_page
from equalize.commands.report.page import PAGE_FILE, write_page
from equalize.commands.scan import select_sites
from equalize.commands.verify import CHECKED_IMAGES, as_stored, save_proven
from equalize.data.hf_datasets import Choice
from equalize.device import device_of, precision_of
from equalize.distributed import is_main, own_device
from equalize.errors import InputError
from equalize.messages import Notify, Progress, first_of, ignore, ignore_progress
from equalize.moments.measure import Measurement
from equalize.plan.calibrate import calibrate
from equalize.plan.indicator import with_expectation
from equalize.plan.plan import Plan, ScaleTo, Strategy
from equalize.sites.scan import Scan
from equalize.version import __version__


def calibrate_checkpoint(
    name: ModelName,
    data: str | Path,
    out: str | Path,
    *,
    strategy: Strategy = "auto",
    scale: ScaleTo = "step",
    pattern: str | None = None,
    force_preprocessing: bool = False,
    config: CalibrationConfig | None = None,
    dry_run: bool = False,
    demand_sites: bool = True,
    overwrite: bool = False,
    command: str | None = None,
    keep: Callable[[Measurement], None] | None = None,
    progress: Progress = ignore_progress,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> Plan:
    """Measures, embeds, writes, reloads, proves. The processes of a group share the images; the main one writes.

    Args:
        out: whole or absent afterwards. pattern: a glob over layers; None takes every resampled site.
        force_preprocessing: whatever the BatchNorms say. demand_sites: raise where no layer can be equalized.
        command: the command line, for the record. keep: called with what each pass measured, for a report.
    """
    device = own_device(device_of((config := config or CalibrationConfig()).device))
    if not dry_run and is_main():
        demand_apart(out, [Choice.of(data).place, config.colors], inside=True)
        check_target(Path(out), overwrite, name.source)
    checkpoint = _load_original(name, notify)
    labels = strategy == "auto" or keep is not None
    checkpoint, images = open_images(data, checkpoint, config, progress, notify, labels=labels)
    found = select_sites(checkpoint.model, images.shape, pattern, calls=[checkpoint.adapter.heads])
    checkpoint = checkpoint.with_output(images.few(1), notify)
    checkpoint.model.to(device)
    with precision_of(config.precision, device):
        checked = check_input(checkpoint, images.spread())
        if not force_preprocessing:
            checked.demand_right()
        checked.report(notify, warn)
        drawn, tolerance = checkpoint.newly_initialized, config.tolerance
        embed = partial(calibrate, scale=scale, newly_initialized=drawn, found=found, tolerance=tolerance, keep=keep)
        plan = embed(checkpoint.model, images, strategy, name.seed, optimizer=config.optimizer)
    checkpoint.model.cpu()
    images.report_skipped(warn)
    facts = {"optimizer": config.optimizer, "input_check": checked.to_json(), "command": command}
    plan = as_stored(replace(plan, facts=_facts(plan, name, checkpoint, found, images, data) | facts), checkpoint)
    if demand_sites and not plan.sites:
        raise _no_site(name, plan, found)
    if dry_run or not is_main():
        return plan
    return save_proven(checkpoint, name, plan, Path(out), [images.few(CHECKED_IMAGES)], overwrite=overwrite)


def write_calibration_report(plan: Plan, kept: Sequence[Measurement], directory: str | Path, onward: str) -> Path:
    """Writes a page of what was measured and changed, see `write_page`, by what `calibrate_checkpoint` kept.

    Only the main process does. `onward`: the next command, empty if there is none.
    """
    if not is_main():
        return Path(directory) / PAGE_FILE
    statistics = {layer: each for measured in kept for layer, each in measured.statistics.items()}
    histograms = {layer: each for measured in kept for layer, each in measured.histograms.items()}
    sites = [with_expectation(site, statistics.get(site.layer), plan.facts["optimizer"]) for site in plan.sites]
    sections = calibration_page(plan, sites, histograms, onward)
    return write_page(directory, f"Calibration of {plan.facts['source']}", sections)


def _no_site(name: ModelName, plan: Plan, found: Scan) -> InputError:
    reasons = first_of(list(dict.fromkeys(f"{each.at}: {each.reason}" for each in plan.refusals)), 1)
    stuck = plan.strategy == "migrate" and bool(found.sites)
    what = f"has no fusion layer that {'migrate can equalize' if stuck else 'can be equalized'}"
    what += f"{reasons and f' ({reasons})'}; nothing was written"
    remedies = ["name --strategy preserve, which has no branch moved"] if stuck else []
    if found.unlisted:
        remedies.append("choose among fusion layers without a resampled branch: equalize scan --all, and --sites")
    return InputError(name.source, what, remedy=", or ".join(remedies) or "equalize finetune trains it as it is")


def demand_original(checkpoint: Checkpoint) -> None:
    """Refuses, by an InputError, what is equalized already: that would be done twice. `auto` may have done nothing."""
    earlier = "none" if checkpoint.plan_json is None else checkpoint.plan_json.get("strategy", "unknown")
    if earlier != "none":
        raise InputError(checkpoint.source, f"is already equalized (strategy {earlier})", remedy="give the original")


def _load_original(name: ModelName, notify: Notify) -> Checkpoint:
    """The checkpoint, which must not be equalized yet."""
    checkpoint = name.load()
    demand_original(checkpoint)
    for note in checkpoint.notes:
        notify(note)
    if drawn := checkpoint.newly_initialized:
        notify(f"drawn anew under seed {name.seed}: {len(drawn)} tensors ({first_of(drawn)})")
    return checkpoint


def _facts(
    plan: Plan, name: ModelName, checkpoint: Checkpoint, found: Scan, images: Images, data: str | Path
) -> dict[str, Any]:
    """The facts in `equalize.json` beside the plan: provenance, how it was measured, and an empty "check"."""
    return {
        "equalize": __version__,
        "torch": torch.__version__,
        "source": name.source,
        "revision": checkpoint.revision,
        "sha256": checkpoint.sha256,
        "family": checkpoint.family,
        "architecture": checkpoint.architecture,
        "arch": name.arch,
        "arch_args": dict(name.arch_args),
        "key": name.key,
        "logits": checkpoint.output,
        "init_missing": name.init_missing,
        "num_classes": name.num_classes,
        "drawn": list(checkpoint.newly_initialized),
        "preprocess": asdict(checkpoint.preprocess),
        "input_shape": list(images.shape),
        "tracer": found.tracer,
        "data": {"path": str(data), "split": images.dataset.split, "fingerprint": images.dataset.fingerprint()},
        **plan.facts,
        "samples": images.readable,
        "skipped": len(images.skipped),
        "output": None,
        "check": None,
    }
