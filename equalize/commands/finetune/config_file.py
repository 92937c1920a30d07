"""finetune.yaml, and any file that --config names: MODEL, the data and the settings of a training."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from equalize.checkpoint.loading import ModelName
from equalize.checkpoint.preprocess import Override
from equalize.checkpoint.registry import family_of_arch
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.images import working_size
from equalize.commands.training_record import SETTINGS_FILE, read_settings
from equalize.errors import InputError

if TYPE_CHECKING:
    from equalize.commands.finetune.splits import Task

_FILES = ("class_names", "colors", "cache_dir")  # settings that name one


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is trained, and on what: fields are those of `ModelName` and `Override`."""

    model: str | None = None
    data: str | None = None
    arch: str | None = None
    arch_args: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    output: str | None = None
    init_missing: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rescale: float | None = None
    channel_order: Literal["rgb", "bgr"] | None = None

    def name(self, seed: int) -> ModelName:
        """MODEL as it is loaded; weights that it lacks are drawn under the seed."""
        given: dict[str, Any] = {"mean": self.mean, "std": self.std, "rescale": self.rescale}
        given |= {"channels": self.channel_order and self.channel_order.upper()}
        return ModelName(
            source=self.model or "",
            arch=self.arch,
            arch_args=self.arch_args,
            key=self.key,
            output=self.output,
            init_missing=self.init_missing,
            seed=seed,
            preprocess=Override.read(given, "preprocessing"),
        )

    @classmethod
    def of(cls, name: ModelName, data: str | Path) -> Self:
        """Its inverse, with absolute paths."""
        override = asdict(name.preprocess)
        channels = override.pop("channels")
        return cls(
            model=_absolute(name.source),
            data=_with_path("data", str(data), _absolute),
            arch=name.arch and _with_path("arch", name.arch, _absolute),
            arch_args=dict(name.arch_args),
            key=name.key,
            output=name.output,
            init_missing=name.init_missing,
            channel_order=channels and channels.lower(),
            **override,
        )


def read_run(flags: Mapping[str, Any], file: str | Path | None = None) -> tuple[Subject, TrainConfig]:
    """All of finetune.yaml: from flags, by field, and for those not given from a YAML file.

    A relative path in the file counts from the working directory, else from the file's own. An InputError if the file
    has what it may not have: unknown keys, values of another type, or code to run, which only a flag may name.
    """
    written = {} if file is None else read_config(Path(file).expanduser())
    arch = written.get("arch")
    if arch is not None and "arch" not in flags and family_of_arch(arch).runs_code(arch):
        remedy = f"if you trust that code, say so: --arch {arch}"
        raise InputError(file, f"names code to run ({arch}), which a file may not", remedy=remedy)
    if flags.keys() & {"epochs", "max_steps"}:  # both define the length
        written = {key: value for key, value in written.items() if key not in ("epochs", "max_steps")}
    every = {**written, **flags}
    subject = {each.name: every.pop(each.name) for each in fields(Subject) if each.name in every}
    return Subject(**subject), TrainConfig(**every)


def resolved_settings(task: "Task") -> TrainConfig:
    """The settings with what the data and the checkpoint decided, so that they mean the same without either."""
    config, rule, checkpoint = task.config, task.train.rule, task.checkpoint
    decided: dict[str, Any] = {
        name: _absolute(getattr(config, name)) for name in _FILES if getattr(config, name) is not None
    }
    if not rule.foreground:  # else both must stay undecided: 255 is class 1
        decided |= {"ignore_index": rule.ignore_index, "reduce_labels": "yes" if rule.reduce else "no"}
    return replace(
        config,
        **decided,
        size=config.size or checkpoint.preprocess.size,
        crop=config.crop if config.cache_backbone else config.crop or working_size(checkpoint, config.size),
        num_classes=task.name.num_classes,
    )


def to_yaml(subject: Subject, settings: TrainConfig) -> str:
    """What `read_run` reads, without what is not given."""
    every = asdict(subject) | asdict(settings)
    given = {key: value for key, value in every.items() if value not in (None, (), {})}
    text: str = yaml.safe_dump(json.loads(json.dumps(given)), sort_keys=False)  # tuples as lists
    return f"# equalize finetune --config {SETTINGS_FILE} -o OUT\n{text}"


def read_config(path: Path) -> dict[str, Any]:
    """The fields of `Subject` and `TrainConfig` in a YAML file; see `read_run`."""
    content = read_settings(path)
    if "out" in content:
        raise InputError(path, "has out", remedy="give -o OUT, so that no file decides what is replaced")
    types = get_type_hints(Subject) | get_type_hints(TrainConfig)
    if unknown := sorted(content.keys() - types.keys()):
        close = [match for key in unknown for match in get_close_matches(key, types, 1)]
        what = f"has unknown keys: {', '.join(unknown)}"
        if close:
            raise InputError(path, what, remedy=f"did you mean {', '.join(close)}?")
        raise InputError(path, what, expected=f"some of {', '.join(sorted(types))}")
    found = {key: _typed(value, types[key], f"{path}: {key}") for key, value in content.items()}
    beside = partial(_beside, path.parent)
    paths = {key: _with_path(key, found[key], beside) for key in ("model", "data", "arch", *_FILES) if found.get(key)}
    return found | paths


def _typed(value: Any, kind: Any, where: str) -> Any:
    """A YAML value as its field has it: a list is a tuple, and 1e-4, which YAML reads as text, is a number."""
    plain = tuple(value) if isinstance(value, list) else value
    for read in (lambda: plain, lambda: tuple(map(float, plain)) if isinstance(plain, tuple) else float(plain)):
        try:
            found = read()
            type_validator(where, found, kind)
        except (TypeError, ValueError):
            continue
        return found
    expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise InputError(where, "has a value of another kind", got=repr(value), expected=expected)


def _with_path(key: str, value: str, change: Callable[[str], str]) -> str:
    """A value with the path in it changed: DATA:image=COLUMN, transformers:DIR and file.py:Factory hold one."""
    if key == "arch" and family_of_arch(value).scheme is not None:
        scheme, _, place = value.partition(":")
        return f"{scheme}:{change(place)}"
    if key == "arch":
        place, colon, factory = value.rpartition(":")
        return f"{change(place)}{colon}{factory}"
    if key == "data" and not Path(change(value)).exists():
        place, colon, choice = value.partition(":")
        return f"{change(place)}{colon}{choice}"
    return change(value)


def _absolute(value: str) -> str:
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value


def _beside(folder: Path, value: str) -> str:
    """A path from the working directory or, where it leads nowhere from there, from the folder."""
    path = Path(value).expanduser()
    return value if path.exists() or not (folder / path).exists() else str(folder / path)
