"""What is known about a written checkpoint, read from the files that lie in it: the facts a model card may state."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Self

from equalize.checkpoint.base import PLAN_FILE
from equalize.checkpoint.matching import PREFIXES
from equalize.checkpoint.reading import ARCHITECTURE_FILE, read_json, read_weights, weight_files
from equalize.errors import CheckpointError, InputError, ResourceError
from equalize.plan import Plan

__all__ = ["Base", "Evaluation", "Facts", "Training", "read_facts"]

EVALUATION_FILE = "evaluation.json"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that came in. Of a path on the user's machine only the last name is told."""

    name: str
    hub: bool
    """Whether `name` is a Hub id."""
    revision: str | None
    sha256: str | None

    @classmethod
    def of(cls, plan: Plan) -> Self | None:
        """As the plan records it."""
        source, revision = plan.facts.get("source"), plan.facts.get("revision")
        if not isinstance(source, str) or not source:
            return None
        hub = isinstance(revision, str)  # only a Hub id resolves to a commit
        told = source if source.startswith("torchvision:") else _last_name(source)
        name = source.partition("@")[0] if hub else told
        return cls(name=name, hub=hub, revision=revision if hub else None, sha256=plan.facts.get("sha256"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A score in percent, as `equalize evaluate` or a fine-tuning run wrote it."""

    metrics: Mapping[str, float]
    """mIoU, mAcc and aAcc, those there are."""
    classes: tuple[Mapping[str, Any], ...] = ()
    images: int | None = None
    data: str | None = None
    split: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The last step that `metrics.jsonl` tells of."""

    steps: int | None
    epochs: float | None
    loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the card is written from."""

    family: str
    """transformers, smp, torchvision or custom: whose loader reads it."""
    architecture: str
    """The class or function that builds it."""
    arguments: Mapping[str, Any]
    """Of that function, for state dicts."""
    state_dict: bool
    """Whether it is one: to be loaded into a network that is built first."""
    prefix: str
    """What a wrapper left before the keys of a state dict in `model.safetensors`."""
    processor: bool
    """Whether an image processor lies beside the weights."""
    licence_file: str | None
    plan: Plan | None
    base: Base | None
    training: Training | None
    evaluation: Evaluation | None
    readme: str | None
    """The card that lies in the directory already."""
    base_readme: str | None
    """The card of the base model, where it is at hand."""


def read_facts(out: Path) -> Facts:
    """Reads the facts, and the weight files once, so that nothing damaged goes out.

    Raises:
        InputError: `out` is no directory, no model, or holds a damaged file.
    """
    if not out.exists():
        raise InputError(out, "no such directory")
    if not out.is_dir():
        raise InputError(out, "is not a directory", remedy="push what calibrate or finetune wrote")
    family, architecture, arguments = _identity(out)
    read_weights(*weight_files(out))
    plan = Plan.read(out) if (out / PLAN_FILE).is_file() else None
    records = list(_records(out / METRICS_FILE))
    return Facts(
        family=family,
        architecture=architecture,
        arguments=arguments,
        state_dict=(out / ARCHITECTURE_FILE).is_file(),
        prefix=_prefix(out / "model.safetensors"),
        processor=(out / "preprocessor_config.json").is_file() or (out / "processor_config.json").is_file(),
        licence_file=next((name for name in ("LICENSE", "LICENSE.md", "LICENSE.txt") if (out / name).is_file()), None),
        plan=plan,
        base=Base.of(plan) if plan else None,
        training=_training(records),
        evaluation=_evaluation(out, records),
        readme=_text(out / "README.md"),
        base_readme=_base_readme(plan) if plan else None,
    )


def _identity(out: Path) -> tuple[str, str, Mapping[str, Any]]:
    """Family, architecture and arguments, by the JSON files that lie beside the weights."""
    config = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    if (out / ARCHITECTURE_FILE).is_file():
        record = read_json(out / ARCHITECTURE_FILE)
        family, _, name = str(record.get("arch")).partition(":")
        arguments = record.get("arch_args")
        if family in ("torchvision", "smp"):
            return family, name, arguments if isinstance(arguments, dict) else {}
        if family != "transformers":
            return "custom", str(record.get("arch")), {}
    if isinstance(config.get("_model_class"), str):
        return "smp", str(config["_model_class"]), {}
    if "model_type" in config:
        named = config.get("architectures")
        return "transformers", str(named[0]) if isinstance(named, list) and named else "", {}
    raise CheckpointError(
        out,
        "is no model that can be pushed",
        expected="a directory that calibrate or finetune wrote, or one saved by transformers or smp",
    )


def _prefix(path: Path) -> str:
    keys = read_weights((path,)).tensors if path.is_file() else {}
    return next((prefix for prefix in PREFIXES if keys and all(key.startswith(prefix) for key in keys)), "")


def _base_readme(plan: Plan) -> str | None:
    """From the Hub's cache or the base's own directory; nothing is downloaded for it."""
    from huggingface_hub import try_to_load_from_cache

    base = Base.of(plan)
    if base is None:
        return None
    if not base.hub:
        return _text(Path(plan.facts["source"]).expanduser() / "README.md")
    cached = try_to_load_from_cache(base.name, "README.md", revision=base.revision)
    return _text(Path(cached)) if isinstance(cached, str) else None


def _text(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ResourceError(path, f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(path, "is not UTF-8 text", remedy="save it as UTF-8") from error


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON-lines file; a line that a crash cut short is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def _training(records: list[Mapping[str, Any]]) -> Training | None:
    steps = [record for record in records if "loss" in record and "mIoU" not in record]
    if not steps:
        return None
    last = steps[-1]
    step, epoch = _number(last.get("step")), _number(last.get("epoch"))
    return Training(steps=None if step is None else int(step), epochs=epoch, loss=_number(last.get("loss")))


def _evaluation(out: Path, records: list[Mapping[str, Any]]) -> Evaluation | None:
    """`evaluation.json` if there is one, else the last evaluation of the training run."""
    path = out / EVALUATION_FILE
    scores = [read_json(path)] if path.is_file() else [record for record in records if _is_score(record)]
    found: Mapping[str, Any] = scores[-1] if scores else {}
    metrics = {name: value for name in ("mIoU", "mAcc", "aAcc") if (value := _number(found.get(name))) is not None}
    if not metrics:
        return None
    classes, images, step = (found.get(key) for key in ("classes", "images", "step"))
    data, split = found.get("data"), found.get("split")
    if isinstance(data, Mapping):  # as `equalize.json` tells it
        split = data.get("split", split)
        data = data.get("path")
    return Evaluation(
        metrics=metrics,
        classes=tuple(row for row in classes if isinstance(row, dict)) if isinstance(classes, list) else (),
        images=images if isinstance(images, int) else None,
        data=_last_name(data) if isinstance(data, str) and data else None,
        split=split if isinstance(split, str) else None,
        step=step if isinstance(step, int) else None,
    )


def _is_score(record: Mapping[str, Any]) -> bool:
    return _number(record.get("mIoU")) is not None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _last_name(path: str) -> str:
    """Of a path as typed; the rest is nobody's business."""
    return PurePath(path).name or "unnamed"
