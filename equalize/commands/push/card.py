"""The model card: metadata for the Hub and a text for readers, both from facts alone.

The text we write stands between two marks, so that a card which its user goes on editing keeps the user's words and a
later push renews only ours.
"""

import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from equalize.commands.push.facts import Facts
from equalize.commands.push.results import Evaluation
from equalize.commands.push.text import describe
from equalize.errors import InputError

__all__ = ["model_card"]

_BEGIN = "<!-- equalize: written from facts; a later push renews what stands between these marks -->"
_END = "<!-- equalize: end -->"
_OURS = re.compile(re.escape(_BEGIN) + r".*?" + re.escape(_END), re.DOTALL)

_TAGS = ("equalize", "scale-equalization", "semantic-segmentation")
_LIBRARIES = {"transformers": "transformers", "smp": "segmentation-models-pytorch"}
_METRIC_IDS = {"mIoU": "mean_iou", "mAcc": "mean_accuracy", "aAcc": "accuracy"}
_INHERITED = ("license", "license_name", "license_link")  # what holds for whatever is made of the base


def model_card(facts: Facts, repository: str, revision: str | None = None) -> str:
    """The content of README.md.

    A card that the directory holds already is kept: its metadata win over ours, its text stays. Only if it is the base
    model's own card, copied along, what it says of the base's training and scores is not said of this model: it
    is folded away under the new text, and only the licence is taken over.

    Args:
        facts: of the directory that is pushed.
        repository: ORG/NAME.
        revision: the branch, where it is not the main one.

    Raises:
        InputError: the metadata of the card that exists cannot be read.
    """
    base = _parse(facts.base_readme, "the base model's README.md") if facts.base_readme else None
    ours = _metadata(facts, repository, base.data if base else None)
    text = f"{_BEGIN}\n\n{describe(facts, repository, ours.get('license'), revision)}\n{_END}"
    title = f"\n# {repository.partition('/')[2]}\n\n{text}\n"
    if facts.readme is not None and facts.readme != facts.base_readme:
        return str(_renewed(_parse(facts.readme, "README.md"), ours, text))
    if base is not None and facts.readme is not None and (kept := _OURS.sub("", base.text).strip()):
        title += f"\n<details>\n<summary>Card of the base model</summary>\n\n{kept}\n\n</details>\n"
    return f"---\n{ours.to_yaml()}\n---\n{title}"


def _metadata(facts: Facts, repository: str, base: Any) -> ModelCardData:
    score = facts.evaluation
    return ModelCardData(
        base_model=facts.base.name if facts.base and facts.base.hub else None,
        library_name=_LIBRARIES.get(facts.family),
        pipeline_tag="image-segmentation",
        tags=list(_TAGS),
        model_name=repository.partition("/")[2] if score else None,
        metrics=[_METRIC_IDS[name] for name in score.metrics] if score else None,
        eval_results=_results(score) if score else None,
        **{key: base.get(key) for key in _INHERITED if base is not None},
    )


def _results(score: Evaluation) -> list[EvalResult]:
    """One entry of `model-index` a metric; a data set that nobody recorded is called unknown."""
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            dataset_type=(score.data or "unknown").lower(),
            dataset_name=score.data or "unknown",
            dataset_split=score.split,
            metric_type=_METRIC_IDS[name],
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in score.metrics.items()
    ]


def _parse(content: str, where: str) -> ModelCard:
    block = "" if content.lstrip().startswith("---") else "---\n{}\n---\n"  # a card without metadata is one as well
    try:
        return ModelCard(block + content)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(where, f"has metadata that cannot be read ({reason})", remedy="mend or remove it") from error


def _renewed(card: ModelCard, ours: ModelCardData, text: str) -> ModelCard:
    """The user's card with our facts where it says nothing, our scores, and our text in its place."""
    data = card.data
    results = [*(data.get("eval_results") or []), *(ours.get("eval_results") or [])]
    tags = data.get("tags") or []
    data["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *_TAGS]))
    for key in ("base_model", "library_name", "pipeline_tag", "metrics", *_INHERITED):
        if data.get(key) is None:
            data[key] = ours.get(key)
    if results:
        data["eval_results"] = list({_measured(result): result for result in results}.values())
        data["model_name"] = data.get("model_name") or ours.get("model_name")
    if _BEGIN in card.text:
        card.text = _OURS.sub(lambda _: text, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{text}\n"
    return card


def _measured(result: EvalResult) -> tuple[object, ...]:
    """What was measured, whatever came out: of two, the later one stays."""
    return (*result.unique_identifier, result.metric_type, result.metric_name)
