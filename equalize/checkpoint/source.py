"""Locates MODEL: a file, a directory, a Hub snapshot, or weights that a library publishes."""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from equalize.checkpoint.files.weights import (
    ARCHITECTURE_FILE,
    WEIGHT_SUFFIXES,
    Weights,
    directory_weights,
    read_json,
    read_weights,
    shards,
    weight_files,
)
from equalize.errors import CheckpointError, ResourceError
from equalize.hub import HUB_ID, hub_reachable, why_not_reached
from equalize.messages import one_line

NO_WEIGHTS = Weights(files=(), index=None, tensors={}, file_of={})
"""Stands for the weights where JSON files describe the structure."""
_PUBLISHED = re.compile(r"([a-z]{2,}):([\w.-]+)")
_SIDE_FILES = ["*.json", "*.txt", "*.md", "LICENSE*", "finetune.yaml"]
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DESCRIBING = ("equalize.json", ARCHITECTURE_FILE, "config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a checkpoint is, and the content of the JSON files beside it."""

    kind: Literal["file", "directory", "published"]
    path: Path
    """The file or directory; of published weights, until they are fetched, the network's name."""
    library: str | None = None
    """The library that publishes the weights."""
    published: str | None = None
    """The name of the published weights."""
    repository: str | None = None
    revision: str | None = None
    """The commit that a Hub id resolved to."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Content of ``config.json``, if there is one and no ``architecture.json``."""
    record: Mapping[str, object] | None = None
    """Content of ``architecture.json``, which equalize writes beside a state dict."""


def locate(source: str | Path) -> Place:
    """Find MODEL. Of a Hub id, only the small files are downloaded: see `fetch_weights`.

    A CheckpointError if it does not exist, a ResourceError if the Hub cannot be reached or has no such model.
    """
    name = os.fspath(source)
    if not name:
        raise CheckpointError("MODEL", "is empty", expected="a path or a model id")
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _directory(path)
        if path.exists():
            return Place(kind="file", path=path)
    except OSError as error:  # permission denied on the way, or a name too long
        raise ResourceError(name, f"cannot be opened ({error.strerror})") from error
    if isinstance(source, str) and (found := _PUBLISHED.fullmatch(name)):
        return Place(kind="published", path=Path(found[2]), library=found[1], published=found[2])
    if isinstance(source, str) and HUB_ID.fullmatch(name) and path.suffix not in WEIGHT_SUFFIXES:
        repository, _, revision = name.partition("@")
        snapshot = _download(repository, revision or None, _SIDE_FILES, name)
        return _directory(snapshot, repository, snapshot.name)
    raise CheckpointError(name, "no such file or directory")


def _directory(path: Path, repository: str | None = None, revision: str | None = None) -> Place:
    record = read_json(path / ARCHITECTURE_FILE) if (path / ARCHITECTURE_FILE).is_file() else None
    config = read_json(path / "config.json") if record is None and (path / "config.json").is_file() else {}
    return Place(kind="directory", path=path, repository=repository, revision=revision, config=config, record=record)


def demand_directory(place: Place) -> None:
    """Refuse a file of a checkpoint directory, if it is no weights or if a plan beside it would be left out.

    Raises:
        CheckpointError: says to give the directory.
    """
    path, directory = place.path, place.path.parent
    if place.kind != "file" or not in_checkpoint(path):
        return
    what = "is one file of a checkpoint"
    if path.name.endswith((*WEIGHT_SUFFIXES, ".index.json")):
        if not (directory / _DESCRIBING[0]).is_file() or path not in _weights_in(directory):
            return
        what += f", and without {_DESCRIBING[0]} beside it its equalization would be lost"
    raise CheckpointError(path, what, remedy=f"give the directory: {directory}")


def in_checkpoint(path: Path) -> bool:
    """Whether a file lies in a checkpoint's directory."""
    return any((path.parent / name).is_file() for name in _DESCRIBING)


def _weights_in(directory: Path) -> tuple[Path, ...]:
    with contextlib.suppress(CheckpointError):
        files, index = weight_files(directory)
        return (*files, *directory.glob("model.safetensors"), *([index] if index else []))
    return ()


def weights_at(place: Place, key: str | None = None) -> Weights:
    """Read the weights of a file or directory; those of a Hub id must have been fetched. See `read_weights`."""
    if place.kind == "directory":
        return directory_weights(place.path, key)
    if place.path.name.endswith(".index.json"):
        return read_weights(shards(place.path), place.path, key)
    return read_weights((place.path,), key=key)


def fetch_weights(place: Place) -> None:
    """Download the weights of a Hub id, at the commit its small files came from: safetensors if there are any."""
    if place.repository is None:
        return
    for name in _WEIGHTS:
        index = place.path / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            wanted = sorted({str(v) for v in weight_map.values()}) if isinstance(weight_map, dict) else []
        else:
            wanted = [name]
        _download(place.repository, place.revision, wanted, place.repository)
        if all((place.path / file).is_file() for file in wanted):
            return
    if not hub_reachable():
        raise _not_cached(place.repository, place.revision, "the weights of ")
    raise CheckpointError(place.repository, "has no weights", expected=" or ".join(_WEIGHTS))


def _download(repository: str, revision: str | None, patterns: list[str], name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    online = hub_reachable()
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=not online)
    except errors.RevisionNotFoundError as error:
        raise ResourceError(name, f"the Hub has no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        remedy = "check the name; private models need `hf auth login`"
        raise ResourceError(name, "no such path, and no such model on the Hub", remedy=remedy) from error
    except errors.LocalEntryNotFoundError as error:
        raise _not_cached(repository, revision) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ResourceError(name, f"cannot be downloaded from the Hub ({one_line(error)})") from error
    return Path(found)


def _not_cached(repository: str, revision: str | None, part: str = "") -> ResourceError:
    """What is neither in the Hub's cache nor to be had; says which revision was looked for, and which are there."""
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs"
    known = sorted(path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file())
    others = f" (it has {', '.join(known)})" if known and revision not in known and not part else ""
    why, remedy = why_not_reached()
    lacks = f"the Hub's cache lacks {part}revision {revision or constants.DEFAULT_REVISION} of it{others}, and {why}"
    fetch = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    what, check = (lacks, "") if part else (f"no such path; {lacks}", "check the name, and ")
    remedy = f"{check}{remedy}, or fetch it where there is a network: {fetch}"
    return ResourceError(f"{repository}@{revision}" if revision else repository, what, remedy=remedy)
