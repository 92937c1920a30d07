"""What is said of scales, plans and proofs, on a terminal and on a page alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from equalize.messages import first_of
from equalize.moments.measure import CONVERGED
from equalize.moments.measured import Expectation
from equalize.plan.plan import MEANING, Plan, PlannedSite

_SHOWN = 5  # changed tensors; JSON has them all
_EXPECTATIONS: Mapping[Expectation, str] = {
    "gain": "expect a gain from equalizing",
    "nothing": "expect nothing from equalizing",
    "unclear": "cannot tell whether equalizing helps",
}


OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}


def expectation(expect: Expectation, delta: float | None) -> str:
    """A plain sentence on what equalizing would bring."""
    measured = "" if delta is None else f": delta {rounded(delta)}"
    return f"{_EXPECTATIONS[expect]}{measured}"


def percent(value: float | None) -> str:
    """A score to two places, `-` where there is none."""
    return "-" if value is None else f"{value:.2f}"


def rounded(delta: float) -> str:
    """To three places, without the sign of a zero."""
    return f"{round(delta, 3) + 0.0:.3f}"


def ratio_of(sigmas: Sequence[float]) -> str:
    """The largest over the smallest."""
    return f"{max(sigmas) / min(sigmas):.2f}" if min(sigmas) > 0 else "infinite (a branch is constant)"


def strategy_of(plan: Plan, site: PlannedSite) -> str:
    """A site's strategy and what it does."""
    means = ""
    if site.strategy == "preserve" and plan.scaled_inputs(site):
        return "preserve: its weights follow a branch that another layer rescaled; in training, as preserve elsewhere"
    if site.changes_function:
        means = "; the branches' means are subtracted in its bias" if site.shift else "; the branches' means stay"
    return f"{site.strategy}: {MEANING[site.strategy]}{means}"


def sigmas_after(plan: Plan, site: PlannedSite) -> list[float]:
    """The scale of each branch as the fusion weights, or the optimizer, see it from now on."""
    sigmas = [branch.std for branch in site.branches]
    if site.strategy == "none":
        return sigmas
    if site.strategy == "preserve":
        return [site.tau] * len(sigmas)
    if site.strategy == "migrate":
        return [sigma / scale for sigma, scale in zip(sigmas, plan.input_scale(site), strict=True)]
    factors = plan.scaled_inputs(site)
    return [branch.std * factors[branch.start] for branch in site.branches]


def effort_of(facts: Mapping[str, Any]) -> str:
    """How much was measured, by the facts of a plan, and why no more."""
    samples, within = facts.get("samples", 0), f"within {100 * (facts.get('tolerance') or CONVERGED):.3g} %"
    known = f"every sigma is known {within}"
    if not facts.get("converged"):
        known = f"it takes more --samples to know every sigma {within}"
    elif facts["images"] < samples:
        known = f"it stopped as {known}"
    images, by = of_all(facts["images"], samples), measured_by(facts.get("measured_by"))
    return f"Measured on {images} images{by} in {facts.get('seconds', 0):.1f} s; {known}."


def of_all(images: int, samples: int) -> str:
    """How many images were measured, and of how many if of more."""
    return f"{images} of {samples}" if images < samples else f"{images}"


def measured_by(way: str | None) -> str:
    """How they were measured, behind the number of images; `way` is as in JSON."""
    if not way:
        return ""
    if way == "cut graph":
        return " on the part of the network that makes the branches"
    reason = way.partition("no cut graph: ")[2].removesuffix(")")
    return f" on the whole network ({f'it could not be cut: {reason}' if reason else 'few images'})"


def changes_of(plan: Plan) -> str:
    """How many tensors were changed, and the first of them."""
    if not plan.changed:
        return "Changed: no tensor."
    names = {key: f"{disk} (in the model {key})" for key, disk in plan.disk_keys.items()}
    keys = [names.get(key, key) for key in plan.changed]
    return f"Changed: {len(keys)} tensors ({first_of(keys, _SHOWN)}); all others kept every bit."


def proof_of(plan: Plan, check: Mapping[str, float], logit_range: float, compared_on: str) -> tuple[str, str, str]:
    """What was compared, what came of the logits, and of the fusion layers.

    `logit_range` is what a change of logits is held against.
    """
    same = not any(site.changes_function for site in plan.sites)
    change = check["max_abs_change"]
    if not same:
        logits = f"logits change by up to {change:.3g}{_of(change, logit_range)}, as meant"
    elif change:
        logits = f"logits differ by at most {change:.2g}{_of(change, logit_range)}, which is rounding"
    else:
        logits = "logits: the same to the last bit"
    against = "what they gave before" if same else "explicit normalization of each branch"
    exact = all(site.exact_border for site in plan.sites)
    why = "" if same else ", which is padded with zeros, not means"
    border = "" if exact else f" inside, {check['border']:.1e} on the border{why}"
    if same and not check["interior"] and not check["border"]:
        layers = "fusion layers: the same to the last bit"
    else:
        layers = f"fusion layers differ from {against} by at most {check['interior']:.1e} of their range{border}"
    return (f"Proof: loaded again by its own library and compared with the original on {compared_on}.", logits, layers)


def _of(change: float, logit_range: float) -> str:
    if not logit_range:
        return ""
    size = f"{logit_range:,.0f}" if logit_range >= 100 else f"{logit_range:.3g}"
    return f" of a range of {size} ({change / logit_range:.1e})"
