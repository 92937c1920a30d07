"""Selects the files of a directory for upload, without access tokens and local paths."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from equalize.checkpoint.files.atomic import TRAINING_STATE
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE
from equalize.errors import InputError
from equalize.hub import HUB_ID

_STAYS = {
    "hidden": (".*",),
    "state for resuming a training run": ("last", "training_args.bin", *TRAINING_STATE),
    "log of a training run": ("runs", "wandb", "events.out.tfevents.*", "*.log"),
    "page for this machine": ("report.html",),  # with local paths, and pictures of the user's data
    "left by a program": ("__pycache__", "*.pyc", "*.tmp", "*.lock", "*.swp", "*~"),
}
"""Reason -> names of files and folders, in lower case."""

PANELS_FILE = "panels.png"

_TOKEN = re.compile(rb"(?<![A-Za-z0-9_])(hf|api_org)_[A-Za-z0-9]{30,}")
_NOT_SCANNED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_RECORDS = ("equalize.json", ARCHITECTURE_FILE, "finetune.yaml")
_PLACES = ("source", "model", "data", "path", "output", "arch", "class_names", "colors", "cache_dir")
_ABSOLUTE = re.compile(r"(~|\.\.?|[A-Za-z]:)?[/\\]")
_FOLDERS = re.compile(r"^([a-z]+:)?.*[/\\](?=.)")  # behind a scheme such as that of `transformers:DIR`


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingFile:
    """A file as it will stand in the repository: its path there, and where it lies, or its content."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def read(self) -> bytes:
        """The content."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


def choose_files(
    directory: Path, prefix: str = "", *, with_panels: bool = False
) -> tuple[list[OutgoingFile], dict[str, str]]:
    """The files of a directory that go, and why each other file or folder stays.

    Symbolic links are neither followed nor sent, wherever they lead. `prefix` is that of the paths.
    """
    files: list[OutgoingFile] = []
    left_out: dict[str, str] = {}
    for entry in sorted(directory.iterdir()):
        path = prefix + entry.name
        if reason := _reason_to_stay(entry):
            left_out[path] = reason
        elif path == PANELS_FILE and not with_panels:
            left_out[path] = "shows the data, see --with-panels"
        elif entry.is_dir():
            inside, left_inside = choose_files(entry, f"{path}/")
            files += inside
            left_out |= left_inside
        else:
            files.append(OutgoingFile(path=path, source=entry))
    return files, left_out


def _reason_to_stay(entry: Path) -> str | None:
    if entry.is_symlink():
        return "symbolic link"
    for reason, patterns in _STAYS.items():
        if any(fnmatchcase(entry.name.lower(), pattern) for pattern in patterns):
            return reason
    return None


def refuse_tokens(files: Sequence[OutgoingFile], token: str | None) -> None:
    """Refuses an access token in any file but the weights: the user's own, or what looks like one of the Hub's.

    The InputError names the file, never the token.
    """
    for file in files:
        if file.path.lower().endswith(_NOT_SCANNED):
            continue
        content = file.read()
        if _TOKEN.search(content) or (token and token.encode() in content):
            raise InputError(file.path, "holds what looks like an access token", remedy="remove it before pushing")


def without_local_paths(file: OutgoingFile) -> OutgoingFile:
    """The file as it is, or rewritten if it is one of ours that records paths of this machine.

    Raises:
        InputError: it is one of ours, and damaged.
    """
    if file.path not in _RECORDS:
        return file
    is_yaml = file.path.endswith(".yaml")
    try:
        before = yaml.safe_load(file.read()) if is_yaml else json.loads(file.read())
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(file.path, "is damaged", remedy="write the directory again") from error
    after = without_paths(before)
    if after == before:
        return file
    text = yaml.safe_dump(after, sort_keys=False) if is_yaml else json.dumps(after, indent=2, ensure_ascii=False) + "\n"
    return replace(file, source=text.encode())


def without_folders(place: str) -> str:
    """The last component of a path, behind its scheme if it has one."""
    return _FOLDERS.sub(r"\1", place)


def without_paths(content: Any) -> Any:
    """A record with the last component in place of each path of this machine; ids on the Hub stay whole."""
    if isinstance(content, list):
        return [without_paths(each) for each in content]
    if not isinstance(content, dict):
        return content
    return {
        key: _public(key, value, content) if key in _PLACES and isinstance(value, str) else without_paths(value)
        for key, value in (content | _arch_args(content)).items()
    }


def _arch_args(record: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of --arch, of which those that are absolute paths lose their folders."""
    given = record.get("arch_args")
    if not isinstance(given, dict):
        return {}
    paths = {key: value for key, value in given.items() if isinstance(value, str) and _ABSOLUTE.match(value)}
    return {"arch_args": given | {key: without_folders(value) for key, value in paths.items()}}


def _public(key: str, value: str, record: Mapping[str, Any]) -> str:
    if key == "source":
        on_hub = bool(record.get("revision"))  # only an id on the Hub resolves to a commit
    else:
        place = value.partition(":")[0]
        on_hub = key in ("model", "data", "path") and HUB_ID.fullmatch(place) is not None and not Path(place).exists()
    return value if on_hub else without_folders(value)
