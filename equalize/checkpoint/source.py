"""MODEL as typed -> a place on this machine: a file, a directory, a Hub snapshot, or torchvision's own weights."""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from equalize.checkpoint.files.weights import WEIGHT_SUFFIXES, read_json
from equalize.errors import CheckpointError, ResourceError

__all__ = ["HUB_ID", "Place", "fetch_weights", "hub_reachable", "locate"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")
_SIDE_FILES = ["*.json", "*.txt", "*.md", "LICENSE*"]
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a checkpoint lies."""

    kind: Literal["file", "directory", "torchvision"]
    path: Path
    """The file or directory; for torchvision its bare name."""
    repository: str | None = None
    revision: str | None = None
    """The commit that a Hub id resolved to."""


def locate(source: str | Path) -> Place:
    """Find MODEL. Of a Hub id, only the small files are downloaded: see `fetch_weights`.

    Raises:
        CheckpointError: nothing there.
        ResourceError: the Hub cannot be reached, or has no such model.
    """
    name = os.fspath(source)
    if not name or "\0" in name:
        raise CheckpointError(repr(name), "is no path and no model id")
    if isinstance(source, str) and name.startswith("torchvision:"):
        return Place(kind="torchvision", path=Path(name.removeprefix("torchvision:")))
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return Place(kind="directory", path=path)
        if path.exists():
            return Place(kind="file", path=path)
    except OSError as error:  # permission denied on the way, or a name too long
        raise ResourceError(name, f"cannot be opened ({error.strerror})") from error
    if isinstance(source, str) and HUB_ID.fullmatch(name) and path.suffix not in WEIGHT_SUFFIXES:
        return _snapshot(name)
    raise CheckpointError(name, "no such file or directory")


def hub_reachable() -> bool:
    """Whether asking the Hub makes sense: not switched off, and its name resolves (or a proxy will do that)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = constants.ENDPOINT.partition("://")[2].partition("/")[0].partition(":")[0]
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _snapshot(name: str) -> Place:
    repository, _, revision = name.partition("@")
    directory = _download(repository, revision or None, _SIDE_FILES, name)
    return Place(kind="directory", path=directory, repository=repository, revision=directory.name)


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
    raise CheckpointError(place.repository, "has no weights", expected=" or ".join(_WEIGHTS))


def _download(repository: str, revision: str | None, patterns: list[str], name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    online = hub_reachable()
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=not online)
        )
    except errors.RevisionNotFoundError as error:
        raise ResourceError(name, f"the Hub has no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise ResourceError(
            name,
            "no such path, and no such model on the Hub",
            remedy="check the name; private models need `hf auth login`",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ResourceError(
            name,
            "no such path, and the Hub cannot be reached to look for a model of that name",
            remedy="check the name or the network",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ResourceError(name, f"cannot be downloaded from the Hub ({line})") from error
