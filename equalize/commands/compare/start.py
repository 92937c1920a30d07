"""Where an arm begins: what is done to the network before its first step, and the scales of its branches then.

BatchNorms that never saw data are estimated in every arm, the baseline too: after a tenth of the training much of
their first value is still there, and it must not be mistaken for equalization.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from equalize.checkpoint import Checkpoint
from equalize.commands.calibrate import find
from equalize.commands.compare.arms import Arm
from equalize.commands.images import Images
from equalize.errors import SiteError
from equalize.moments.batch_norms import estimate_norms, untouched_norms
from equalize.plan.apply import apply_edits, redraw, with_aliases
from equalize.plan.calibrate import calibrate
from equalize.plan.plan import Edit, Plan
from equalize.sites.scan import Scan
from equalize.sites.sites import Site

__all__ = ["begin", "digest", "scales"]


def begin(checkpoint: Checkpoint, images: Images, arm: Arm, seed: int) -> Plan:
    """Does to the model, in place, what the arm is about.

    Args:
        checkpoint: whose model begins.
        images: that the branches and norms are measured on.
        arm: which.
        seed: of weights that are drawn anew.

    Returns:
        Everything that was done, and the measured sites; for an arm without equalization its sites say `preserve`.

    Raises:
        SiteError: the network has no fusion layer of resampled branches.
    """
    model = checkpoint.model
    found = find(checkpoint, images.shape)
    if not found.sites:
        raise SiteError(checkpoint.source, "has no fusion layer of resampled branches: nothing to compare")
    edits = _estimate(model, untouched_norms(model), images)
    if arm.redrawn:
        edits += _redraw(model, found, seed)
        edits += _estimate(model, list(dict.fromkeys(norm for site in found.sites for norm in site.norms)), images)
    plan = calibrate(
        model,
        images,
        arm.strategy or "preserve",
        seed,
        keep_norm=arm.keep_norm,
        drawn=checkpoint.newly_initialized,
        found=found,
    )
    return replace(plan, edits=with_aliases((*edits, *plan.edits), model))


def _estimate(model: nn.Module, norms: Sequence[str], images: Images) -> list[Edit]:
    edits = [
        Edit(tensor=key, action="set", values=tuple(value.double().flatten().tolist()))
        for key, value in estimate_norms(model, norms, images).items()
    ]
    apply_edits(edits, model)
    return edits


def _redraw(model: nn.Module, found: Scan, seed: int) -> list[Edit]:
    """As `reinit` draws: the layer of the site at place i under seed + i."""
    edits: list[Edit] = []
    for place, site in enumerate(found.sites):
        try:
            redraw(model.get_submodule(site.weight.rpartition(".")[0]), seed + place)
        except (SiteError, AttributeError):
            continue  # `reinit` refuses it too
        keys = [site.weight] + ([site.bias] if site.bias else [])
        edits += [Edit(tensor=key, action="draw", seed=seed + place) for key in keys]
    apply_edits(edits, model)
    return edits


def scales(plan: Plan, arm: Arm) -> list[dict[str, Any]]:
    """For each site the ratio of its largest sigma to its smallest, as measured, and as training sees it."""
    return [
        {"layer": site.layer, "strategy": site.strategy if arm.strategy else None, **_ratios(plan, site, arm)}
        for site in plan.sites
    ]


def _ratios(plan: Plan, site: Site, arm: Arm) -> dict[str, float]:
    sigmas = [branch.std or 0.0 for branch in site.branches]
    seen = sigmas
    if arm.strategy and site.strategy == "migrate":
        seen = [sigma / scale for sigma, scale in zip(sigmas, plan.input_scale(site), strict=True)]
    elif arm.strategy and (site.strategy != "preserve" or arm.train_as != "folded"):
        seen = [1.0] * len(sigmas)
    return {"ratio": max(sigmas) / min(sigmas), "ratio_after": max(seen) / min(seen)}


def digest(model: nn.Module) -> str:
    """Sha256 over every tensor: two arms of one seed begin with the same."""
    total = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        total.update(key.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
