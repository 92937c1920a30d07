"""What is known about a written checkpoint, read from its files: the facts that a model card may state."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from equalize.checkpoint.checkpoint import PLAN_FILE
from equalize.checkpoint.files.weights import read_json, read_weights, weight_files
from equalize.commands.push.files import without_paths
from equalize.errors import InputError
from equalize.plan.plan import Plan

__all__ = ["Facts", "read_facts"]

_METRICS = ("mIoU", "mAcc", "aAcc")
_LOGGED = ("step", "epoch", "loss")
_RUN = "last/run.json"  # of a training, with or without a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the card is written from, but for how the model is loaded. Without paths of this machine.

    Attributes:
        origin: the base model's source, revision and sha256, where they were recorded.
        base_model: its id, if it came from the Hub.
        trained: the plan's record of a training.
        logged: the last line of `metrics.jsonl` with a loss.
        score: what was scored: data, split, images, step, classes. metrics: those of mIoU, mAcc and aAcc, in percent.
        settings, license_file: names of files.
        readme: the card that lies in the directory already. base_readme: that of the base model, where it is at hand.
    """

    plan: Plan | None
    origin: Mapping[str, Any]
    base_model: str | None
    trained: Mapping[str, Any]
    logged: Mapping[str, Any]
    score: Mapping[str, Any]
    metrics: Mapping[str, float]
    settings: str | None
    license_file: str | None
    readme: str
    base_readme: str


def read_facts(out: Path) -> Facts:
    """Reads the facts, and the weight files once, so that nothing damaged goes out.

    Raises:
        InputError: `out` is no directory, holds no weights, or holds a damaged file.
    """
    if not out.exists():
        raise InputError(out, "no such directory")
    if not out.is_dir():
        raise InputError(out, "is not a directory", remedy="push what calibrate or finetune wrote")
    read_weights(*weight_files(out))
    name = _first(out, PLAN_FILE, _RUN)
    record = read_json(out / name) if name else {}
    plan = Plan.from_json(without_paths(record), out / PLAN_FILE) if name == PLAN_FILE else None
    trained = plan.facts.get("finetuned") if plan else None
    trained = trained if isinstance(trained, Mapping) else {}
    source = str(record.get("source") or "")
    revision = record.get("revision")
    base_model = source.partition("@")[0] if isinstance(revision, str) else None
    lines = _lines(out / "metrics.jsonl")
    losses = [line for line in lines if "mIoU" not in line and all(map(_is_number, map(line.get, _LOGGED)))]
    score = _score(out / "evaluation.json", lines, trained)
    return Facts(
        plan=plan,
        origin=without_paths(record),
        base_model=base_model,
        trained=trained,
        logged=losses[-1] if losses else {},
        score=score,
        metrics={name: score[name] for name in _METRICS if _is_number(score.get(name))},
        settings=_first(out, "finetune.yaml"),
        license_file=_first(out, "LICENSE", "LICENSE.md", "LICENSE.txt"),
        readme=_text(out / "README.md"),
        base_readme=_base_readme(source, base_model, str(revision)),
    )


def _base_readme(source: str, base_model: str | None, revision: str) -> str:
    """From the Hub's cache or the base's own directory; nothing is downloaded for it."""
    if base_model is None:
        return _text(Path(source).expanduser() / "README.md") if source else ""
    cached = try_to_load_from_cache(base_model, "README.md", revision=revision)
    return _text(Path(cached)) if isinstance(cached, str) else ""


def _score(file: Path, lines: Sequence[Mapping[str, Any]], trained: Mapping[str, Any]) -> Mapping[str, Any]:
    """The score of these weights, `{}` if there is none.

    That is `evaluation.json` if the user put it there; else what the plan tells of the training's last save; else the
    best line of `metrics.jsonl`, as a training leaves its best model.
    """
    if file.is_file():
        found: Mapping[str, Any] = without_paths(read_json(file))
    elif isinstance(trained.get("score"), Mapping):
        found = {"step": trained.get("step"), **trained["score"]}
    else:
        scored = [line for line in lines if _is_number(line.get("mIoU"))]
        found = max(scored, key=lambda line: float(line["mIoU"]), default={})
    data = found.get("data")
    return {**found, "data": data.get("path"), "split": data.get("split")} if isinstance(data, Mapping) else found


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """The objects of `metrics.jsonl`; a line that a crash cut short is passed over."""
    found: list[Mapping[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _first(out: Path, *names: str) -> str | None:
    return next((name for name in names if (out / name).is_file()), None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise InputError(path, "is not UTF-8 text", remedy="save it as UTF-8") from error
