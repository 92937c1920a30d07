"""What is known about a written checkpoint, read from the files that lie in it: the facts a model card may state."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Self

from equalize.checkpoint.checkpoint import PLAN_FILE
from equalize.checkpoint.families.mmsegmentation.family import MMSegmentation
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, read_json, read_weights, weight_files
from equalize.checkpoint.keys import PREFIXES
from equalize.commands.push.results import Evaluation, Training, read_evaluation, read_training
from equalize.errors import CheckpointError, InputError, ResourceError
from equalize.plan.plan import Plan

__all__ = ["Base", "Facts", "read_facts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that came in. Of a path on the user's machine only the last name is told."""

    name: str
    hub: bool
    """Whether `name` is a Hub id."""
    revision: str | None
    sha256: str | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self | None:
        """From a plan's facts, or from what a training is of."""
        source, revision = record.get("source"), record.get("revision")
        if not isinstance(source, str) or not source:
            return None
        hub = isinstance(revision, str)  # only a Hub id resolves to a commit
        told = source if source.startswith("torchvision:") else _last_name(source)
        name = source.partition("@")[0] if hub else told
        return cls(name=name, hub=hub, revision=revision if hub else None, sha256=record.get("sha256"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the card is written from."""

    family: str
    """transformers, smp, torchvision, mmsegmentation or custom: whose loader reads it."""
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
    record = plan.facts if plan else _of_training(out)
    return Facts(
        family=family,
        architecture=architecture,
        arguments=arguments,
        state_dict=(out / ARCHITECTURE_FILE).is_file(),
        prefix=_prefix(out / "model.safetensors"),
        processor=(out / "preprocessor_config.json").is_file() or (out / "processor_config.json").is_file(),
        licence_file=next((name for name in ("LICENSE", "LICENSE.md", "LICENSE.txt") if (out / name).is_file()), None),
        plan=plan,
        base=Base.of(record),
        training=read_training(out, plan),
        evaluation=read_evaluation(out, plan),
        readme=_text(out / "README.md"),
        base_readme=_base_readme(record),
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
        if record.get("arch") == MMSegmentation.scheme:
            return "mmsegmentation", "EncoderDecoder", {}
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


def _of_training(out: Path) -> Mapping[str, Any]:
    """What a training that followed no equalization left of its beginning."""
    run = out / "last" / "run.json"
    return read_json(run) if run.is_file() else {}


def _base_readme(record: Mapping[str, Any]) -> str | None:
    """From the Hub's cache or the base's own directory; nothing is downloaded for it."""
    from huggingface_hub import try_to_load_from_cache

    base = Base.of(record)
    if base is None:
        return None
    if not base.hub:
        return _text(Path(record["source"]).expanduser() / "README.md")
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


def _last_name(path: str) -> str:
    """Of a path as typed; the rest is nobody's business."""
    return PurePath(path).name or "unnamed"
