"""What goes out tells nobody where things lie on the user's machine: of paths, the last name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import yaml

from equalize.checkpoint.files.weights import ARCHITECTURE_FILE
from equalize.checkpoint.source import HUB_ID
from equalize.commands.push.outgoing import OutgoingFile
from equalize.data.hf_datasets import Choice
from equalize.errors import InputError, ResourceError

__all__ = ["without_places"]

_PLACES = frozenset({"source", "output", "data", "path", "arch", "class_names"})
_MAY_BE_ON_THE_HUB = frozenset({"source", "data", "path"})
_SCHEMES = ("torchvision:", "smp:", "transformers:", "mmseg:")
_WITHOUT_PLACES = frozenset({"sites", "refusals", "edits"})  # their "source" is a module of the network

_Format = tuple[Callable[[str], Any], Callable[[Any], str]]


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _as_yaml(content: Any) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


_FILES: Mapping[str, _Format] = {
    "equalize.json": (json.loads, _as_json),
    ARCHITECTURE_FILE: (json.loads, _as_json),
    "finetune.yaml": (yaml.safe_load, _as_yaml),
}


def without_places(file: OutgoingFile) -> OutgoingFile:
    """The file as it is, or with last names in place of paths if it is one that records where things lie.

    Raises:
        InputError: such a file is damaged. ResourceError: it cannot be read.
    """
    if file.path not in _FILES or not isinstance(file.source, Path):
        return file
    read, write = _FILES[file.path]
    try:
        before = read(file.source.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(file.source, "is damaged", remedy="write the directory again") from error
    except OSError as error:
        raise ResourceError(file.source, f"cannot be read ({error.strerror})") from error
    after = _cut(before)
    if after == before:
        return file
    content = write(after).encode()
    return replace(file, size=len(content), source=content)


def _cut(content: Any) -> Any:
    if isinstance(content, list):
        return [_cut(each) for each in content]
    if not isinstance(content, dict):
        return content
    return {key: value if key in _WITHOUT_PLACES else _told(key, value, content) for key, value in content.items()}


def _told(key: str, value: Any, around: Mapping[str, Any]) -> Any:
    if key not in _PLACES or not isinstance(value, str):
        return _cut(value)
    if key in _MAY_BE_ON_THE_HUB and HUB_ID.fullmatch(Choice.of(value).place):
        resolved = isinstance(around.get("revision"), str)  # a Hub id has one of these, a path has not
        if resolved or not Path(value).exists():
            return value
    scheme = next((scheme for scheme in _SCHEMES if value.startswith(scheme)), "")
    place = value.removeprefix(scheme)
    return scheme + (PurePath(place).name or place)
