"""What `finetune` wrote beside a model of how it was trained: finetune.yaml, read for scoring that model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.errors import InputError
from equalize.messages import Notify

SETTINGS_FILE = "finetune.yaml"

_REDUCED = {"yes": True, "no": False}


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a YAML file of settings, keys with underscores; an InputError if it cannot be read so."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(path, f"cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(path, "is no configuration", expected="lines such as lr: 0.0001")
    return {key.replace("-", "_"): value for key, value in content.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """How a model's images and labels were read in its training; each None where that is not known."""

    size: tuple[int, int] | None = None
    """(H, W)."""
    ignore_index: int | None = None
    reduce_labels: bool | None = None
    colors: str | None = None
    """A file that is there, or ``none``."""
    masks_drawn_on: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, notify: Notify) -> Self:
        """That of a directory `finetune` wrote, its files sought in the working directory and beside it.

        Raises:
            InputError: finetune.yaml is damaged.
        """
        path = checkpoint.stored.path / SETTINGS_FILE
        if not path.is_file():
            return cls()
        content = read_settings(path)
        size, ignored, colors = (content.get(key) for key in ("size", "ignore_index", "colors"))
        integers = [*(size if isinstance(size, list) else []), *([] if ignored is None else [ignored])]
        if (size is not None and len(integers) < 2) or not all(type(each) is int for each in integers):
            raise InputError(path, "is damaged", expected="size: [H, W] and ignore_index: N as finetune writes them")
        if colors is not None and colors != "none" and not Path(colors).is_file():
            notify(f"{path}: was trained on masks with the colors of {colors}, which is not here; see --colors")
            colors = None
        return cls(
            size=(size[0], size[1]) if size else None,
            ignore_index=ignored,
            reduce_labels=_REDUCED.get(str(content.get("reduce_labels"))),
            colors=colors,
            masks_drawn_on=content.get("masks_drawn_on"),
        )

    def reduced_before(self, checkpoint: Checkpoint) -> bool | None:
        """As `Checkpoint.reduced_before`; what the last training recorded goes before what the format's files say."""
        known = self.reduce_labels is not None and not checkpoint.newly_initialized
        return self.reduce_labels if known else checkpoint.reduced_before


def settings_taken(
    config: object, trained: Mapping[str, Any], usual: Mapping[str, Any], notify: Notify
) -> dict[str, Any]:
    """Settings of the training by field, for those that are not given; says which, and what contradicts the training.

    Args:
        config: the settings of a command. trained: those of the training; None and "auto" for unknown.
        usual: what holds without either, which need not be said.
    """
    taken: dict[str, Any] = {}
    for field, value in trained.items():
        given = getattr(config, field)
        is_same_file = field == "colors" and given and os.path.realpath(given) == os.path.realpath(str(value))
        if value in (None, "auto") or str(given) == str(value) or is_same_file:
            continue
        if given not in (None, "auto"):
            notify(f"{_flag(field, given)}: it was trained with {_flag(field, value)}; the flag counts")
        elif field != "reduce_labels":  # it is that of `check_split` unless labels contradict it
            taken[field] = value
    if said := [_flag(field, value) for field, value in taken.items() if value != usual.get(field)]:
        notify(f"as it was trained ({SETTINGS_FILE}): {' '.join(said)}")
    return taken


def _flag(field: str, value: object) -> str:
    """A setting as it is typed."""
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"--{field.replace('_', '-')} {text}"
