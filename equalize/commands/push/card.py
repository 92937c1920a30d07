"""The model card: metadata for the Hub and a text for readers, both from facts alone.

The generated text stands between two marks: in a card that its user goes on editing, a later push renews only what
stands between them.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from equalize.checkpoint.files.atomic import PLAN_FILE
from equalize.checkpoint.files.weights import check_directory, read_json
from equalize.checkpoint.written import written_by
from equalize.commands.push.files import PANELS_FILE, OutgoingFile, without_local_paths, without_paths
from equalize.errors import InputError
from equalize.plan.plan import MEANING, Plan

_BEGIN = "<!-- equalize: written from facts; a later push renews what stands between these marks -->"
_END = "<!-- equalize: end -->"
_GENERATED = re.compile(re.escape(_BEGIN) + r".*?" + re.escape(_END), re.DOTALL)

_RUN = "last/run.json"  # of a training, with or without a plan
_COMMANDS = "last/commands.txt"  # a line for each sitting of it
_CURVES = "curves.png"
_METRICS = {"mIoU": "mean_iou", "mAcc": "mean_accuracy", "aAcc": "accuracy"}  # our names -> the Hub's
_TAGS = ["equalize", "scale-equalization", "semantic-segmentation"]
_INHERITED = ("license", "license_name", "license_link")  # of the base model, as they hold for what is made of it


def model_card(out: Path, repository: str, revision: str | None = None, *, with_panels: bool = False) -> str:
    """The content of README.md for what lies in a directory, to be pushed to ORG/NAME.

    A card that the directory holds already is kept: its metadata win over ours, its text stays. Only if it is the base
    model's own card, copied along, what it says of the base's training and scores is not said of this model: it
    is folded away under the new text, and only the license is taken over.

    `revision` is the branch, where it is not the main one. An InputError if there is no model or a damaged one, or the
    card there has metadata that cannot be read.
    """
    facts = _read_facts(out)
    pictures = (_CURVES, *([PANELS_FILE] if with_panels else []))
    family = written_by(out)
    base = _parse(facts["base_readme"], "the base model's README.md")
    title = repository.partition("/")[2]
    ours = _metadata(facts, family.library, title, base)
    card = ModelCard.from_template(
        ours,
        template_path=str(Path(__file__).with_name("card_template.md")),
        begin=_BEGIN,
        end=_END,
        title=title,
        architecture=family.architecture(out),
        loading_code=family.loading_code(out, repository, revision),
        base_card=_GENERATED.sub("", base.text).strip() if facts["readme"] else "",
        meaning=MEANING,
        pictures=[name for name in pictures if _is_file(out / name)],
        code=_code,
        plain=_plain,
        **facts,
    )
    if facts["readme"] in ("", facts["base_readme"]):
        return str(card)
    return str(_renewed(_parse(facts["readme"], "README.md"), ours, card.text))


def _read_facts(out: Path) -> dict[str, Any]:
    """The facts in the files, without local paths; checks the weights, so that no damaged file is uploaded."""
    if not out.is_dir():
        raise InputError(out, "no such directory", remedy="push what calibrate or finetune wrote")
    check_directory(out)
    file = next((path for name in (PLAN_FILE, _RUN) if (path := out / name).is_file()), None)
    record = read_json(file) if file else {}
    origin = without_paths(record)
    plan = Plan.from_json(origin, file) if file and file.name == PLAN_FILE else None
    trained = (plan.facts.get("finetuned") if plan else None) or {}
    source, revision = str(record.get("source") or ""), record.get("revision")
    base_model = source.partition("@")[0] if revision else None
    lines = _lines(out / "metrics.jsonl")
    scored = [line for line in lines if line.get("mIoU") is not None]
    score = trained.get("score") or max(scored, key=lambda line: float(line["mIoU"]), default={})
    return {
        "plan": plan,
        "origin": origin,  # source, revision and sha256 of the base model, where they were recorded
        "base_model": base_model,  # its id, if it came from the Hub
        "trained": trained,  # the plan's record of a training
        "logged": next((line for line in reversed(lines) if "loss" in line), {}),
        "score": score,  # of these weights: data, split, images, step, classes, and the metrics in percent
        "metrics": {name: score[name] for name in _METRICS if score.get(name) is not None},
        "commands": _commands(plan, out),
        "settings": _settings(out / "finetune.yaml"),
        "readme": "" if (out / "README.md").is_symlink() else _text(out / "README.md"),
        "base_readme": _base_readme(source, base_model, str(revision)),
    }


def _commands(plan: Plan | None, out: Path) -> list[str]:
    """The command lines that were recorded: of the calibration, and of each sitting of the training."""
    measured = plan.facts.get("command") if plan else None
    return [*([str(measured)] if measured else []), *_text(out / _COMMANDS).splitlines()]


def _settings(path: Path) -> str:
    """The resolved settings of a training, without local paths."""
    if not _is_file(path):
        return ""
    return without_local_paths(OutgoingFile(path=path.name, source=path)).read().decode().strip()


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()  # links stay behind


def _base_readme(source: str, base_model: str | None, revision: str) -> str:
    """The base model's README from the Hub's cache or its directory; nothing is downloaded."""
    if base_model is None:
        return _text(Path(source).expanduser() / "README.md") if source else ""
    cached = try_to_load_from_cache(base_model, "README.md", revision=revision)
    return _text(Path(cached)) if isinstance(cached, str) else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl`; a line that a crash truncated is skipped."""
    found: list[dict[str, Any]] = []
    for line in _text(path).splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""


def _metadata(facts: Mapping[str, Any], library: str | None, title: str, base: ModelCard) -> ModelCardData:
    score, metrics = facts["score"], facts["metrics"]
    data = str(score.get("data") or "unknown")
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            dataset_type=data.lower(),
            dataset_name=data,
            dataset_split=score.get("split"),
            metric_type=_METRICS[name],
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in metrics.items()
    ]
    return ModelCardData(
        base_model=facts["base_model"],
        library_name=library,
        pipeline_tag="image-segmentation",
        tags=_TAGS,
        **{key: base.data.get(key) for key in _INHERITED},
        model_name=title if results else None,
        metrics=[_METRICS[name] for name in metrics] or None,
        eval_results=results or None,
    )


def _parse(content: str, where: str) -> ModelCard:
    block = "" if content.lstrip().startswith("---") else "---\n{}\n---\n"  # a card without metadata is one as well
    try:
        return ModelCard(block + content)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(where, f"has metadata that cannot be read ({reason})", remedy="mend or remove it") from error


def _renewed(card: ModelCard, ours: ModelCardData, generated: str) -> ModelCard:
    """The user's card with our facts where it says nothing, our scores, and our text in its place."""
    text = _BEGIN + generated.partition(_BEGIN)[2].partition(_END)[0] + _END
    data, tags = card.data, card.data.get("tags") or []
    data["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *_TAGS]))
    for key in ("base_model", "library_name", "pipeline_tag", "metrics", "model_name", *_INHERITED):
        data[key] = data.get(key) or ours.get(key)
    new = ours.get("eval_results") or []
    old = [each for each in data.get("eval_results") or [] if not any(each.is_equal_except_value(one) for one in new)]
    data["eval_results"] = [*old, *new] or None
    kept = _GENERATED.sub(lambda _: text, card.text)
    card.text = kept if _BEGIN in kept else f"{kept.rstrip()}\n\n{text}\n"
    return card


def _plain(text: object) -> str:
    """One line of Markdown that stays inside its table cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: object) -> str:
    return f"`{' '.join(str(text).split()).replace('`', '').replace('|', '')}`"
