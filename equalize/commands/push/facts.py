"""What is known about a written checkpoint, read from its files: the facts that a model card may state."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from equalize.checkpoint.checkpoint import PLAN_FILE
from equalize.checkpoint.files.weights import read_json, read_weights, weight_files
from equalize.commands.push.files import without_paths
from equalize.errors import InputError
from equalize.plan.plan import Plan

__all__ = ["METRICS", "Facts", "read_facts"]

METRICS = {"mIoU": "mean_iou", "mAcc": "mean_accuracy", "aAcc": "accuracy"}
"""Our names -> the Hub's."""

_RUN = "last/run.json"  # of a training, with or without a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the card is written from, but for how the model is loaded. Without paths of this machine.

    Attributes:
        origin: the base model's source, revision and sha256, where they were recorded.
        base_model: its id, if it came from the Hub.
        trained: the plan's record of a training.
        logged: the last line of `metrics.jsonl` with a loss.
        score: of these weights: what the plan tells of the training's last save, else the best line of `metrics.jsonl`.
        metrics: the score's mIoU, mAcc and aAcc, in percent.
        readme: the card that lies in the directory already. base_readme: that of the base model, where it is at hand.
    """

    plan: Plan | None
    origin: Mapping[str, Any]
    base_model: str | None
    trained: Mapping[str, Any]
    logged: Mapping[str, Any]
    score: Mapping[str, Any]
    metrics: Mapping[str, float]
    readme: str
    base_readme: str


def read_facts(out: Path) -> Facts:
    """Reads the facts, and the weight files once, so that nothing damaged goes out.

    Raises:
        InputError: `out` is no directory, holds no weights, or holds a damaged file.
    """
    if not out.is_dir():
        raise InputError(out, "no such directory", remedy="push what calibrate or finetune wrote")
    read_weights(*weight_files(out))
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
    return Facts(
        plan=plan,
        origin=origin,
        base_model=base_model,
        trained=trained,
        logged=next((line for line in reversed(lines) if "loss" in line), {}),
        score=score,
        metrics={name: score[name] for name in METRICS if score.get(name) is not None},
        readme="" if (out / "README.md").is_symlink() else _text(out / "README.md"),
        base_readme=_base_readme(source, base_model, str(revision)),
    )


def _base_readme(source: str, base_model: str | None, revision: str) -> str:
    """From the Hub's cache or the base's own directory; nothing is downloaded for it."""
    if base_model is None:
        return _text(Path(source).expanduser() / "README.md") if source else ""
    cached = try_to_load_from_cache(base_model, "README.md", revision=revision)
    return _text(Path(cached)) if isinstance(cached, str) else ""


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """The objects of `metrics.jsonl`; a line that a crash cut short is passed over."""
    found: list[Mapping[str, Any]] = []
    for line in _text(path).splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
