"""`equalize scan`: a checkpoint's fusion layers and, given images, the scales of their branches."""

import contextlib
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.loading import ModelName
from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.images import Images, input_shape, open_images
from equalize.commands.input_check import check_input
from equalize.commands.report.layers import scan_page
from equalize.commands.report.page import PAGE_FILE, write_page
from equalize.device import device_of, precision_of
from equalize.distributed import is_main, own_device
from equalize.errors import CheckpointError, InputError, SiteError
from equalize.graph.record import Call
from equalize.messages import Notify, Progress, ignore, ignore_progress
from equalize.moments.batch_norms import untouched_norms
from equalize.moments.measure import measure_branches
from equalize.moments.measured import Expectation, with_moments
from equalize.plan.calibrate import re_estimate
from equalize.plan.indicator import Optimizer, expected_of_all, with_expectation
from equalize.plan.plan import SCHEMA, site_json
from equalize.sites.scan import Scan, scan
from equalize.sites.sites import SiteKind


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointScan:
    """A scan and what was scanned.

    Attributes:
        source: as typed. family, architecture: of the checkpoint.
        input_shape: what the network was traced with, (N, C, H, W).
        scan: its sites; their branches with moments if images were given.
        images: how many were measured; None without. samples: of how many that were drawn and can be read.
        converged: whether every sigma is known as well as was asked for.
        measured_by: the method of measuring; None without images.
        expect, delta: whether training is expected to gain by equalizing, see `indicator`; None without images.
        optimizer: of that training.
        missing: keys that the checkpoint lacks and --init-missing draws, where it was not given.
        input_check: what the BatchNorms say of the input; None without images, or where none can tell.
        histograms: of the branches' values, by layer, if asked for.
    """

    source: str
    family: str
    architecture: str
    input_shape: tuple[int, ...]
    scan: Scan
    images: int | None = None
    samples: int = 0
    converged: bool = False
    measured_by: str | None = None
    expect: Expectation | None = None
    delta: float | None = None
    optimizer: Optimizer = "adamw"
    missing: tuple[str, ...] = ()
    input_check: Mapping[str, Any] | None = None
    histograms: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """What `equalize scan --json` prints."""
        answer = {"expect": self.expect, "delta": self.delta, "optimizer": self.optimizer}
        pass_facts = {"images": self.images, "samples": self.samples, "converged": self.converged}
        measured = {} if self.images is None else {**pass_facts, "input_check": self.input_check}
        return {
            "schema": SCHEMA,
            "source": self.source,
            "family": self.family,
            "architecture": self.architecture,
            "input_shape": list(self.input_shape),
            "tracer": self.scan.tracer,
            **({"missing": list(self.missing)} if self.missing else {}),
            **({} if self.expect is None else answer),
            **measured,
            "sites": [site_json(site) for site in self.scan.sites],
            "refusals": [refusal.to_json() for refusal in self.scan.refusals],
        }


def scan_checkpoint(
    name: ModelName,
    *,
    shape: Sequence[int] | None = None,
    plain: bool = False,
    data: str | Path | None = None,
    config: CalibrationConfig | None = None,
    histograms: bool = False,
    progress: Progress = ignore_progress,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> CheckpointScan:
    """Finds the fusion layers of a checkpoint, from its configuration alone unless there are images.

    Args:
        shape: to trace it with, (N, C, H, W); by default two images of `config.size`, else of the checkpoint's own.
        plain: list fusion layers without a resampled branch as well.
        data, config: images to measure the branches on; the processes of a group share them.
        histograms: count the values of the branches, for a report.
    """
    config = config or CalibrationConfig()
    kinds: tuple[SiteKind, ...] = ("resampled", "plain") if plain else ("resampled",)
    checkpoint = name.load(weights=data is not None)
    images = None
    if data is not None:
        checkpoint, images = open_images(data, checkpoint, config, progress, notify, labels=True)
        shape = images.shape
    shape = tuple(shape or input_shape(checkpoint, config.size))
    found = _scan_network(name, checkpoint, torch.empty(shape, device="meta"), kinds)
    facts: dict[str, Any] = {}
    if images is not None:
        found, facts = _measure_sites(checkpoint, found, images, config, histograms, notify, warn)
        images.report_skipped(warn)
    for note in checkpoint.notes:
        notify(note)
    return CheckpointScan(
        source=name.source,
        family=checkpoint.family,
        architecture=checkpoint.architecture,
        input_shape=shape,
        scan=found,
        missing=() if name.init_missing else checkpoint.missing,
        **facts,
    )


def write_scan_report(found: CheckpointScan, directory: str | Path, onward: str) -> Path:
    """Writes a page of what was measured, see `write_page`, with the next command, if this is the main process."""
    if is_main():
        write_page(directory, f"Fusion layers of {found.source}", scan_page(found, onward))
    return Path(directory) / PAGE_FILE


def select_sites(
    model: nn.Module, shape: Sequence[int], pattern: str | None = None, *, calls: Sequence[Call] = ()
) -> Scan:
    """The sites of a network traced with (N, C, H, W): the resampled ones, or those whose layer matches a glob.

    `calls`: see `scan`. An InputError that lists what there is if no layer matches.
    """
    kinds: tuple[SiteKind, ...] = ("resampled",) if pattern is None else ("resampled", "plain")
    found = scan(model, torch.empty(tuple(shape), device="meta"), kinds=kinds, calls=calls)
    if pattern is None:
        return found
    chosen = tuple(site for site in found.sites if fnmatch.fnmatchcase(site.layer, pattern))
    if not chosen:
        there = ", ".join(site.layer for site in found.sites)
        expected = f"one of: {there}" if there else "no --sites, as the network has no fusion layer"
        raise InputError("--sites", f"matches no fusion layer: {pattern}", expected=expected)
    return replace(found, sites=chosen)


def _measure_sites(
    checkpoint: Checkpoint,
    found: Scan,
    images: Images,
    config: CalibrationConfig,
    histograms: bool,
    notify: Notify,
    warn: Notify,
) -> tuple[Scan, dict[str, Any]]:
    """The scan with the moments of every branch and what to expect; how many images were measured, and how."""
    device = own_device(device_of(config.device))
    model = checkpoint.model.to(device)
    # what was drawn trains with statistics of its own, so it is measured with these, as calibrate does
    norms = _before_sites(untouched_norms(model), found) if checkpoint.newly_initialized else []
    if norms:
        notify(f"estimated on the images first: {len(norms)} BatchNorms that never saw data")
    with precision_of(config.precision, device):
        checked = check_input(checkpoint, images.spread())
        checked.report(notify, warn)
        re_estimate(model, norms, images, found, config.tolerance)
        measured = measure_branches(
            *(model, found.sites, images), tolerance=config.tolerance, statistics=True, histograms=histograms
        )
    sites = tuple(
        with_expectation(
            *(with_moments(site, measured.moments[site.layer]), measured.statistics.get(site.layer), config.optimizer)
        )
        for site in found.sites
    )
    expect, delta = expected_of_all(sites)
    facts = {
        "images": measured.images,
        "samples": images.readable,
        "converged": measured.is_known(config.tolerance),
        "measured_by": measured.method or None,
        "expect": expect,
        "delta": delta,
        "optimizer": config.optimizer,
        "input_check": checked.to_json(),
        "histograms": measured.histograms,
    }
    return replace(found, sites=sites), facts


def _before_sites(norms: Sequence[str], found: Scan) -> list[str]:
    """Without those behind a last site, which none of them can see."""
    upstream = {layer for site in found.sites for layer in site.upstream}
    behind = {norm for site in found.sites if site.layer not in upstream for norm in site.norms}
    return [norm for norm in norms if norm not in behind]


def _scan_network(name: ModelName, checkpoint: Checkpoint, example: Tensor, kinds: Collection[SiteKind]) -> Scan:
    """A scan from the configuration alone if that can be read: what a run finds may depend on the weights."""
    without = any(tensor.is_meta for tensor in nn.Module.parameters(checkpoint.model))
    find = partial(scan, example=example, kinds=kinds, calls=[checkpoint.adapter.heads])
    try:
        found = find(checkpoint.model)
    except SiteError:
        if without:
            with contextlib.suppress(CheckpointError):
                return find(name.load(weights=True).model)
        raise
    if without and found.ran:
        with contextlib.suppress(CheckpointError):  # a configuration alone, or an encoder
            return find(name.load(weights=True).model)
    return found
