"""What `equalize scan` shows: a checkpoint's fusion layers and, given images, the scales of their branches."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equalize.checkpoint.load import ModelName
from equalize.commands.images import Images, Measuring, Progress, device_of, input_shape, precision_of
from equalize.errors import CheckpointError, SiteError
from equalize.moments.measure import measure
from equalize.peers import ALONE, Peers
from equalize.plan.plan import SCHEMA, site_json
from equalize.plan.strategies import with_moments
from equalize.sites.scan import Scan, scan
from equalize.sites.sites import SiteKind

__all__ = ["Survey", "survey"]

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A scan and what was scanned.

    Attributes:
        source: as typed. family, architecture: of the checkpoint.
        input_shape: what the network was traced with, (N, C, H, W).
        scan: its sites; their branches with moments if images were given.
        images: how many were measured; None without.
        measured_by: how, where they were.
    """

    source: str
    family: str
    architecture: str
    input_shape: tuple[int, ...]
    scan: Scan
    images: int | None = None
    measured_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What `equalize scan --json` prints."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "family": self.family,
            "architecture": self.architecture,
            "input_shape": list(self.input_shape),
            "tracer": self.scan.tracer,
            "sites": [site_json(site) for site in self.scan.sites],
            "refusals": [asdict(refusal) for refusal in self.scan.refusals],
        }


def survey(
    name: ModelName,
    *,
    shape: Sequence[int] | None = None,
    plain: bool = False,
    data: str | Path | None = None,
    how: Measuring | None = None,
    peers: Peers = ALONE,
    progress: Progress = lambda done, of: None,
    say: Say = lambda line: None,
    warn: Say = lambda line: None,
) -> Survey:
    """Finds the fusion layers of a checkpoint, from its configuration alone unless there are images.

    Args:
        name: the model.
        shape: to trace it with, (N, C, H, W); by default two images of `how.size`, else of the checkpoint's own.
        plain: list fusion layers without a resampled branch as well.
        data: images to measure the branches on.
        how: those images, and the pass over them.
        peers: the processes that share them.
        progress: called with the images done in this pass, and all of it.
        say, warn: called with what a user should know, or may want to act on; a line at a time.
    """
    how = how or Measuring()
    kinds: tuple[SiteKind, ...] = ("resampled", "plain") if plain else ("resampled",)
    device = peers.device(device_of(how.device))
    autocast = precision_of(how.precision, device)
    checkpoint = name.load(weights=data is not None)
    images = None if data is None else Images(data, checkpoint, how, progress, peers)
    if images is not None:
        say(f"preprocessing: {checkpoint.preprocess}")
        say(f"data: {images.dataset.describe()}")
        shape = images.shape
    shape = tuple(shape or input_shape(checkpoint, how.size))
    found = _scanned(name, checkpoint.model, torch.empty(shape, device="meta"), kinds)
    number = 0
    ways: list[str] = []
    if images is not None:
        with autocast:
            moments = measure(
                checkpoint.model.to(device), found.sites, images, tolerance=how.tolerance, tell=ways.append
            )
        number = max((each.images or 0 for branches in moments.values() for each in branches), default=0)
        found = replace(found, sites=tuple(with_moments(site, moments[site.layer]) for site in found.sites))
        for path, reason in images.skipped:
            warn(f"skipped {path}: {reason}")
    for note in checkpoint.notes:
        say(note)
    return Survey(
        source=name.source,
        family=checkpoint.family,
        architecture=checkpoint.architecture,
        input_shape=shape,
        scan=found,
        images=None if images is None else number,
        measured_by=ways[0] if ways else None,
    )


def _scanned(name: ModelName, model: nn.Module, example: Tensor, kinds: Collection[SiteKind]) -> Scan:
    """A scan from the configuration alone, where that will do: the way of a run may depend on the weights there are."""
    without = any(tensor.is_meta for tensor in model.parameters())
    try:
        found = scan(model, example, kinds=kinds)
    except SiteError:
        if without:
            with contextlib.suppress(CheckpointError):
                return scan(name.load(weights=True).model, example, kinds=kinds)
        raise
    if without and found.tracer == "recorder":
        with contextlib.suppress(CheckpointError):  # a configuration alone, or an encoder
            return scan(name.load(weights=True).model, example, kinds=kinds)
    return found
