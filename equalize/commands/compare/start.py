"""Where an arm begins: what is done to the network before its first step, and the scales of its branches then.

BatchNorms that never saw data are estimated in every arm, the baseline too: after a tenth of the training much of
their first value is still there, and it must not be mistaken for equalization.
"""

import contextlib
import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from equalize.checkpoint import Checkpoint
from equalize.commands.calibrate import find
from equalize.commands.compare.arms import Arm
from equalize.commands.images import Images
from equalize.errors import SiteError
from equalize.moments.batch_norms import untouched_norms
from equalize.plan.apply import apply_edits, with_aliases
from equalize.plan.calibrate import calibrate, norms_behind, re_estimate, stages
from equalize.plan.draw import draw_site
from equalize.plan.plan import Edit, Plan, PlannedSite
from equalize.plan.strategies import choose
from equalize.sites.scan import Scan

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
    edits = re_estimate(model, untouched_norms(model), images, found)
    if arm.redrawn:
        edits += _redraw(model, images, found, seed)
    plan = calibrate(
        model,
        images,
        arm.strategy or "preserve",
        seed,
        keep_norm=arm.keep_norm,
        newly_initialized=checkpoint.drawn,
        found=found,
    )
    return replace(plan, edits=with_aliases((*edits, *plan.edits), model))


def _redraw(model: nn.Module, images: Images, found: Scan, seed: int) -> list[Edit]:
    """What `reinit` does but for equalizing: the same draws, the same norms re-estimated, in the same stages."""
    choices = choose(found.sites, "reinit", seed)
    edits: list[Edit] = []
    for stage in stages(choices):
        draws: list[Edit] = []
        for choice in stage:
            with contextlib.suppress(SiteError):  # `reinit` refuses it too
                draws += draw_site(model, choice.site, choice.seed)[1]
        apply_edits(draws, model)
        edits += draws + re_estimate(model, norms_behind(stage, choices), images, found)
    return edits


def scales(plan: Plan, arm: Arm) -> list[dict[str, Any]]:
    """For each site the ratio of its largest sigma to its smallest, as measured, and as training sees it."""
    return [
        {"layer": site.layer, "strategy": site.strategy if arm.strategy else None, **_ratios(plan, site, arm)}
        for site in plan.sites
    ]


def _ratios(plan: Plan, site: PlannedSite, arm: Arm) -> dict[str, float]:
    sigmas = [branch.std for branch in site.branches]
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
