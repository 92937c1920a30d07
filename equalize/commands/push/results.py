"""What a training and an evaluation left in a directory: how the weights came about, and how well they do."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from equalize.checkpoint.files.weights import read_json
from equalize.plan.plan import Plan

__all__ = ["Evaluation", "Training", "read_evaluation", "read_training"]

_EVALUATION = "evaluation.json"
_METRICS = "metrics.jsonl"
_SETTINGS = "finetune.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A score in percent, as `equalize evaluate` or a training wrote it."""

    metrics: Mapping[str, float]
    """mIoU, mAcc and aAcc, those there are."""
    classes: tuple[Mapping[str, Any], ...] = ()
    images: int | None = None
    data: str | None = None
    """The last name of its path."""
    split: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How far a training went."""

    steps: int | None
    epochs: float | None
    loss: float | None
    """The last one."""
    kept: int | None
    """The step whose weights these are."""
    train_as: str | None
    """What the optimiser saw of the fusion weights: explicit or folded."""
    settings: str | None
    """The file that holds all settings."""


def read_training(out: Path, plan: Plan | None) -> Training | None:
    """From `metrics.jsonl` and the plan."""
    losses = [record for record in _records(out) if "loss" in record and "mIoU" not in record]
    trained = _trained(plan)
    if not losses and not trained:
        return None
    last = losses[-1] if losses else {}
    train_as = trained.get("train_as")
    return Training(
        steps=_integer(last.get("step")),
        epochs=_number(last.get("epoch")),
        loss=_number(last.get("loss")),
        kept=_integer(trained.get("step")),
        train_as=train_as if isinstance(train_as, str) else None,
        settings=_SETTINGS if (out / _SETTINGS).is_file() else None,
    )


def read_evaluation(out: Path, plan: Plan | None) -> Evaluation | None:
    """The score of the weights that lie there.

    That is `evaluation.json` if somebody put it there; else what the plan tells of the training's last save; else the
    best evaluation in `metrics.jsonl`, as a training leaves its best model.
    """
    found = _found(out, plan)
    metrics = {name: value for name in ("mIoU", "mAcc", "aAcc") if (value := _number(found.get(name))) is not None}
    if not metrics:
        return None
    classes, images = found.get("classes"), found.get("images")
    data, split = found.get("data"), found.get("split")
    if isinstance(data, Mapping):  # as `equalize.json` tells it
        split = data.get("split", split)
        data = data.get("path")
    return Evaluation(
        metrics=metrics,
        classes=tuple(row for row in classes if isinstance(row, dict)) if isinstance(classes, list) else (),
        images=images if isinstance(images, int) else None,
        data=PurePath(data).name or None if isinstance(data, str) else None,
        split=split if isinstance(split, str) else None,
        step=_integer(found.get("step")),
    )


def _found(out: Path, plan: Plan | None) -> Mapping[str, Any]:
    if (out / _EVALUATION).is_file():
        return read_json(out / _EVALUATION)
    trained = _trained(plan)
    if isinstance(trained.get("score"), Mapping):
        return {"step": trained.get("step"), **_scored_on(plan, trained), **trained["score"]}
    scores = [(value, record) for record in _records(out) if (value := _number(record.get("mIoU"))) is not None]
    return max(scores, key=lambda each: each[0])[1] if scores else {}


def _scored_on(plan: Plan | None, trained: Mapping[str, Any]) -> Mapping[str, Any]:
    """The split, and the data set where it is the one that was calibrated on as well."""
    recipe = trained.get("recipe")
    recipe = recipe if isinstance(recipe, Mapping) else {}
    calibrated = plan.facts.get("data") if plan and recipe.get("calibrate") else None
    path = calibrated.get("path") if isinstance(calibrated, Mapping) else None
    return {"data": path, "split": recipe.get("val_split")}


def _trained(plan: Plan | None) -> Mapping[str, Any]:
    trained = plan.facts.get("finetuned") if plan else None
    return trained if isinstance(trained, Mapping) else {}


def _records(out: Path) -> list[Mapping[str, Any]]:
    """The objects of `metrics.jsonl`; a line that a crash cut short is passed over."""
    path = out / _METRICS
    records: list[Mapping[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _integer(value: object) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
