"""The arms of a comparison: what is done to the model before training, and what each is compared with.

none            the model as it is
none+head-lr3   the same, the weights of the fusion layers at three times the learning rate; none+head-lr10: ten times
rescale         weights times tau/sigma, tau = sigma_rms, trained as they are stored: folded
paper           the same with tau = 1
explicit        the start of `rescale`, trained through equalizers: the optimizer sees what was drawn
preserve        the function as it is, trained through equalizers; preserve+paper: with tau = 1
migrate         the function as it is, scale moved into the layers before
auto            what `calibrate` does
redrawn         fusion layers drawn anew, not equalized
reinit          fusion layers drawn anew, the same draw, and equalized

Some may end in +explicit or +folded: what the optimizer sees, see `equalize.plan.attach`.

BatchNorms that never saw data are estimated in every arm, the baseline too: after a tenth of the training much of
their first value is still there, and it must not be mistaken for equalization.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.commands.calibrate import demand_original
from equalize.commands.finetune.config import TrainAs
from equalize.commands.images import Images
from equalize.commands.scan import select_sites
from equalize.errors import InputError, SiteError
from equalize.moments.batch_norms import untouched_norms
from equalize.plan.apply import apply_edits, with_aliases
from equalize.plan.calibrate import calibrate, norms_behind, re_estimate, stages
from equalize.plan.choose import choose
from equalize.plan.draw import draw_site
from equalize.plan.edits import Edit
from equalize.plan.indicator import Optimizer
from equalize.plan.plan import Plan, ScaleTo, Strategy
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
    scale: ScaleTo = "step"
    """What branches are equalized to."""
    train_as: TrainAs | None = None
    """What the optimizer sees; None leaves the choice to `finetune`."""
    fusion_lr_mult: float = 1.0
    """How much faster the weights of the fusion layers learn."""

    @property
    def start(self) -> str:
        """A name for what is done before training; arms that share it start from one plan."""
        return "redrawn" if self.redrawn else f"{self.strategy or 'preserve'}-{self.scale}"


ARMS = (
    Arm(name="none"),
    Arm(name="none+head-lr3", fusion_lr_mult=3),
    Arm(name="none+head-lr10", fusion_lr_mult=10),
    Arm(name="rescale", strategy="rescale", train_as="folded"),
    Arm(name="paper", strategy="rescale", scale="paper", train_as="folded"),
    Arm(name="paper+explicit", strategy="rescale", scale="paper", train_as="explicit"),
    Arm(name="explicit", strategy="rescale", train_as="explicit"),
    Arm(name="preserve", strategy="preserve", train_as="explicit"),
    Arm(name="preserve+paper", strategy="preserve", scale="paper", train_as="explicit"),
    Arm(name="preserve+folded", strategy="preserve", train_as="folded"),
    Arm(name="redrawn", redrawn=True),
    *(Arm(name=name, strategy=name) for name in ("auto", "migrate", "reinit")),
    *(Arm(name=f"{name}+explicit", strategy=name, train_as="explicit") for name in ("auto", "migrate", "reinit")),
    *(Arm(name=f"{name}+folded", strategy=name, train_as="folded") for name in ("auto", "migrate", "reinit")),
)
"""All arms."""


def read_arms(texts: Iterable[str]) -> tuple[Arm, ...]:
    """At least two arms, no two the same; see `read_arm`."""
    arms = tuple(read_arm(text) for text in texts)
    names = [arm.name for arm in arms]
    if len(arms) < 2 or len(set(names)) < len(names):
        raise InputError("--arms", "are no two different arms", got=",".join(names), expected="such as none,rescale")
    return arms


def read_arm(text: str) -> Arm:
    """Such as `reinit+explicit`."""
    words = sorted(text.strip().split("+"))
    for arm in ARMS:
        if sorted(arm.name.split("+")) == words:
            return arm
    known = ", ".join(arm.name for arm in ARMS)
    raise InputError("--arms", "has an arm that is unknown", got=repr(text), expected=f"some of {known}")


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


def fusion_layers(checkpoint: Checkpoint, shape: Sequence[int]) -> Scan:
    """What arms differ in: at least one site of a network that is traced with (N, C, H, W).

    Raises:
        SiteError: the network has no fusion layer of resampled branches. InputError: it is equalized already.
    """
    demand_original(checkpoint)
    found = select_sites(checkpoint.model, shape, calls=[checkpoint.adapter.heads])
    if not found.sites:
        raise SiteError(checkpoint.source, "has no fusion layer of resampled branches: nothing to compare")
    return found


def prepare_arm(checkpoint: Checkpoint, images: Images, arm: Arm, seed: int, optimizer: Optimizer = "adamw") -> Plan:
    """Equalizes or re-initializes the model, in place, as the arm says, measured on the images.

    By `optimizer` it will be trained, which "auto" asks for.

    Returns:
        Everything that was done, and the measured sites; for an arm without equalization its sites say `preserve`.

    Raises:
        SiteError, InputError: see `fusion_layers`.
    """
    model = checkpoint.model
    found = fusion_layers(checkpoint, images.shape)
    edits = re_estimate(model, untouched_norms(model), images, found)
    if arm.redrawn:
        edits += _redraw(model, images, found, seed)
    plan = calibrate(
        model,
        images,
        arm.strategy or "preserve",
        seed,
        scale=arm.scale,
        optimizer=optimizer,
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
        explicit = train_as != "folded"
        in_effect = arm.strategy and site.strategy != "none" and (explicit or site.changes_function)
        if in_effect:
            seen = [1.0] * len(sigmas)
        ratios = {"ratio": max(sigmas) / min(sigmas), "ratio_after": max(seen) / min(seen)}
        rows.append({"layer": site.layer, "strategy": site.strategy if arm.strategy else None, **ratios})
    return rows
