"""The arms of a comparison: what is done to the model before training, and what each is compared with.

none       the model as it is
auto       \
migrate     \
preserve    / equalized by that strategy, see `equalize.plan.strategies`
rescale    /
redrawn    fusion layers drawn anew, not equalized
reinit     fusion layers drawn anew, the same draw, and equalized

The name of an equalized arm may have endings: +keep-norm (the weights keep their norm: what is left is no larger or
smaller effective learning rate), +explicit or +folded (what the optimizer sees, see `equalize.plan.attach`).

BatchNorms that never saw data are estimated in every arm, the baseline too: after a tenth of the training much of
their first value is still there, and it must not be mistaken for equalization.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn

from equalize.checkpoint import Checkpoint
from equalize.commands.finetune.config import TrainAs
from equalize.commands.images import Images
from equalize.commands.scan import select_sites
from equalize.errors import InputError, SiteError
from equalize.moments.batch_norms import untouched_norms
from equalize.plan.apply import apply_edits, with_aliases
from equalize.plan.calibrate import calibrate, norms_behind, re_estimate, stages
from equalize.plan.draw import draw_site
from equalize.plan.plan import Edit, Plan, Strategy
from equalize.plan.strategies import choose
from equalize.sites.scan import Scan


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One starting point of a training."""

    name: str
    """As typed, its endings in one order."""
    strategy: Strategy | None = None
    """The strategy of the equalization; None for no equalization."""
    redrawn: bool = False
    """Whether the fusion layers are drawn anew without being equalized."""
    keep_norm: bool = False
    train_as: TrainAs | None = None
    """What the optimizer sees; None leaves the choice to `finetune`."""


ARMS = (
    Arm(name="none"),
    Arm(name="redrawn", redrawn=True),
    *(
        Arm(
            name="+".join(filter(None, (strategy, keep_norm, train_as))),
            strategy=strategy,
            keep_norm=bool(keep_norm),
            train_as=train_as,
        )
        for strategy in get_args(Strategy)
        for keep_norm in (None, "keep-norm")
        for train_as in (None, *get_args(TrainAs))
    ),
)
"""Names of all arms."""


def read_arms(texts: Iterable[str]) -> tuple[Arm, ...]:
    """At least two arms, no two the same; see `read_arm`."""
    arms = tuple(read_arm(text) for text in texts)
    names = [arm.name for arm in arms]
    if len(arms) < 2 or len(set(names)) < len(names):
        raise InputError("--arms", "are no two different arms", got=",".join(names), expected="such as none,rescale")
    return arms


def read_arm(text: str) -> Arm:
    """Such as `rescale+keep-norm+explicit`; endings in any order."""
    words = sorted(text.strip().split("+"))
    for arm in ARMS:
        if sorted(arm.name.split("+")) == words:
            return arm
    raise InputError(
        "--arms",
        "has an arm that is unknown",
        got=repr(text),
        expected=f"some of none, redrawn, {', '.join(get_args(Strategy))}",
        remedy="+keep-norm and either +explicit or +folded may follow the last five",
    )


def baselines(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """(arm, what it is compared with): `none`, or else the first arm; and what is re-drawn with `redrawn`.

    An arm that is re-drawn and equalized against one that is not re-drawn shows both effects; against `redrawn` only
    that of equalization.
    """
    names = [arm.name for arm in arms]
    first = "none" if "none" in names else names[0]
    pairs = [(name, first) for name in names if name != first]
    if "redrawn" in names and first != "redrawn":
        pairs += [(arm.name, "redrawn") for arm in arms if arm.strategy == "reinit" and arm.name != first]
    return pairs


def prepare_arm(checkpoint: Checkpoint, images: Images, arm: Arm, seed: int) -> Plan:
    """Equalizes or re-initializes the model, in place, as the arm says, measured on the images.

    Returns:
        Everything that was done, and the measured sites; for an arm without equalization its sites say `preserve`.

    Raises:
        SiteError: the network has no fusion layer of resampled branches.
    """
    model = checkpoint.model
    found = select_sites(checkpoint.model, images.shape)
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
        newly_initialized=checkpoint.newly_initialized,
        found=found,
    )
    return replace(plan, edits=with_aliases((*edits, *plan.edits), model))


def _redraw(model: nn.Module, images: Images, found: Scan, seed: int) -> list[Edit]:
    """`reinit` without equalization: the same draws, the same norms re-estimated, in the same stages."""
    undecided = choose(found.sites, "reinit", seed)
    edits: list[Edit] = []
    for stage in stages(undecided):
        draws: list[Edit] = []
        for choice in stage:
            with contextlib.suppress(SiteError):  # `reinit` refuses it too
                draws += draw_site(model, choice.site, choice.seed)[1]
        apply_edits(draws, model)
        undecided = [each for each in undecided if each not in stage]
        edits += draws + re_estimate(model, norms_behind(stage, undecided), images, found)
    return edits


def scales(plan: Plan, arm: Arm, train_as: TrainAs | None) -> list[dict[str, Any]]:
    """For each site the ratio of its largest sigma to its smallest, as measured, and as training sees it."""
    rows = []
    for site in plan.sites:
        sigmas = [branch.std for branch in site.branches]
        seen = [sigma / scale for sigma, scale in zip(sigmas, plan.input_scale(site), strict=True)]
        explicit = train_as == "explicit" or (train_as is None and site.strategy == "preserve")
        if (
            arm.strategy and site.strategy != "none" and (explicit or site.changes_function)
        ):  # otherwise the plan is not in effect
            seen = [1.0] * len(sigmas)
        ratios = {"ratio": max(sigmas) / min(sigmas), "ratio_after": max(seen) / min(seen)}
        rows.append({"layer": site.layer, "strategy": site.strategy if arm.strategy else None, **ratios})
    return rows
