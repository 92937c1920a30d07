"""The words of a model card: Markdown from facts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from equalize.commands.push.facts import Base, Facts
from equalize.commands.push.loading import loading
from equalize.commands.push.results import Evaluation
from equalize.moments.measured import MeasuredBranch
from equalize.plan.plan import Plan, PlannedSite

__all__ = ["describe"]

_PAPER = "[Scale Equalization for Multi-Level Feature Fusion](https://arxiv.org/abs/2402.01149) (Kim & Kim, 2024)"

_STRATEGIES = {
    "migrate": "the fusion weights of each branch times sigma/tau, the layers that produce the branch times "
    "tau/sigma: the same function to rounding, with branches of equal scale",
    "preserve": "weights unchanged; training can take the scales from `equalize.json`",
    "reinit": "the fusion layer drawn anew, its weights divided by the branches' sigma, the means taken off",
    "rescale": "the fusion weights divided by the branches' sigma, the means taken off",
}


def describe(facts: Facts, repository: str, licence: str | None, revision: str | None) -> str:
    """All sections between the marks, each only where there is something to say."""
    sections = [
        *_origin(facts),
        *(_equalization(facts.plan) if facts.plan else ()),
        *_training(facts),
        *(_evaluation(facts.evaluation) if facts.evaluation else ()),
        "## How to load it\n",
        *loading(facts, repository, revision),
        *_licence(facts, licence),
    ]
    return "\n".join(sections)


def _origin(facts: Facts) -> Iterator[str]:
    kind = f"`{facts.architecture}`" if facts.architecture else "network"
    plan = facts.plan
    if plan is None:
        yield f"A semantic segmentation {kind}.\n"
    else:
        how = (
            "with scale equalization embedded in its fusion layers" if plan.sites else "without equalized fusion layers"
        )
        version = plan.facts.get("equalize", "")
        yield f"A semantic segmentation {kind} {how}, by `equalize` {version}. Paper: {_PAPER}.\n"
    yield from _base(facts.base) if facts.base else ()
    drawn = plan.facts.get("drawn") if plan else None
    if plan and drawn:
        yield f"- Drawn anew under seed {plan.seed}, as the base model lacks them: {len(drawn)} tensors"
    yield ""


def _base(base: Base) -> Iterator[str]:
    name = f"[{base.name}](https://huggingface.co/{base.name})" if base.hub else _code(base.name)
    at = f", revision `{base.revision}`" if base.revision else ""
    digest = f", sha256 of its weights `{base.sha256}`" if base.sha256 else ""
    yield f"- Base model: {name}{at}{digest}"


def _equalization(plan: Plan) -> Iterator[str]:
    if plan.sites or plan.refusals:
        yield "## Scale equalization\n"
    if plan.sites:
        yield f"- Strategy: `{plan.strategy}`{', weights kept at the norm they had' if plan.keep_norm else ''}"
        yield from _measuring(plan.facts)
        yield ""
    for site in plan.sites:
        yield from _site(site)
    if plan.refusals:
        yield "Not equalized:\n"
        yield from (f"- {_code(refusal.at)}: {_plain(refusal.reason)}" for refusal in plan.refusals)
        yield ""


def _measuring(facts: Mapping[str, Any]) -> Iterator[str]:
    data, images = facts.get("data"), facts.get("images")
    if isinstance(data, Mapping) and data.get("path"):
        split = f", split `{data['split']}`" if data.get("split") else ""
        counted = f"{images} images of " if images else ""
        yield f"- Scales measured on: {counted}{_code(_last(str(data['path'])))}{split}"
    shape = facts.get("input_shape")
    if isinstance(shape, Sequence) and len(shape) == 4:
        yield f"- Input size: {shape[2]}x{shape[3]} (height x width)"
    check = facts.get("check")
    if isinstance(check, Mapping) and {"max_abs_change", "interior", "border"} <= set(check):
        yield f"- Checked after writing: largest change of a logit {check['max_abs_change']:.2g}"
        yield (
            f"- Fusion layers against their reference, relative to its range: {check['interior']:.2g} inside, "
            f"{check['border']:.2g} at the border"
        )


def _site(site: PlannedSite) -> Iterator[str]:
    yield f"### {_code(site.layer)}\n"
    if site.strategy in _STRATEGIES:
        yield f"`{site.strategy}`: {_STRATEGIES[site.strategy]}.\n"
    sigmas = [branch.std for branch in site.branches if branch.std]
    yield "| channels | source | resampling | mu | sigma | 95 % interval of sigma |"
    yield "|---|---|---|---|---|---|"
    yield from (_branch(branch) for branch in site.branches)
    yield ""
    if len(sigmas) > 1:
        yield f"Before equalization the largest sigma was {max(sigmas) / min(sigmas):.3g} times the smallest.\n"


def _branch(branch: MeasuredBranch) -> str:
    factor = "x".join(f"{each:g}" for each in dict.fromkeys(branch.factor))
    resampling = f"{branch.resampling} {factor}x" if branch.resampling else "none"
    interval = f"± {100 * branch.ci95:.1f} %" if branch.ci95 is not None else "-"
    channels = f"{branch.start}-{branch.stop - 1}"
    moments = f"{branch.mean:.4g} | {branch.std:.4g} | {interval}"
    return f"| {channels} | {_code(branch.source)} | {resampling} | {moments} |"


def _training(facts: Facts) -> Iterator[str]:
    training = facts.training
    if training is None:
        return
    told = [
        f"{training.steps} steps" if training.steps is not None else None,
        f"{training.epochs:g} epochs" if training.epochs is not None else None,
        f"last loss {training.loss:.4g}" if training.loss is not None else None,
    ]
    yield "## Fine-tuning\n"
    if any(told):
        yield f"According to `metrics.jsonl`: {', '.join(fact for fact in told if fact)}."
    if training.kept is not None:
        yield f"The weights are those after step {training.kept}."
    if training.train_as:
        seen = "behind explicit equalizers" if training.train_as == "explicit" else "as they are stored"
        yield f"The optimiser saw the fusion weights {seen}."
    if training.settings:
        yield f"All settings: [{training.settings}]({training.settings})."
    yield ""


def _evaluation(score: Evaluation) -> Iterator[str]:
    where = f" on {_code(score.data)}" if score.data else ""
    split = f", split `{_plain(score.split)}`" if score.split else ""
    images = f", {score.images} images" if score.images else ""
    at = f", at step {score.step}" if score.step is not None else ""
    yield "## Evaluation\n"
    yield ", ".join(f"{name} {value:.2f} %" for name, value in score.metrics.items()) + f"{where}{split}{images}{at}.\n"
    if score.classes:
        yield "| class | IoU | Acc |"
        yield "|---|---|---|"
        for row in score.classes:
            name = _plain(str(row.get("name", row.get("id", ""))))
            yield f"| {name} | {_percent(row.get('IoU'))} | {_percent(row.get('Acc'))} |"
        yield ""


def _licence(facts: Facts, licence: str | None) -> Iterator[str]:
    if not licence and not facts.licence_file:
        return
    yield "## Licence\n"
    if licence:
        yield f"The base model's card states: {_plain(licence)}.\n"
    if facts.licence_file:
        yield f"See [{facts.licence_file}]({facts.licence_file}).\n"


def _percent(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _plain(text: object) -> str:
    """One line of Markdown that stays inside its table cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: object) -> str:
    return f"`{' '.join(str(text).split()).replace('`', '').replace('|', '')}`"
