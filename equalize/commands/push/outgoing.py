"""Which files of a directory may leave the machine, and which stay and why."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG

from equalize.errors import InputError, ResourceError

__all__ = ["LeftOut", "OutgoingFile", "choose_files", "refuse_tokens"]

_STAYS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("hidden", (".*",)),
    (
        "state for resuming a training run",
        (
            *("last", "checkpoint-*", "global_step*", "optimizer*", "*.optimizer*", "*optim_states*", "scheduler.*"),
            *("scaler.*", "rng_state*", "random_states*", "training_args.bin", "trainer_state.json", "zero_to_fp32.py"),
        ),
    ),
    ("log of a training run", ("runs", "wandb", "events.out.tfevents.*", "*.log")),
    ("left by a program", ("__pycache__", "*.pyc", "*.tmp", "*.lock", "*.swp", "*~")),
)
"""Reason -> names, of files or of folders on the way to them, in lower case."""

_TOKEN = re.compile(rb"(?<![A-Za-z0-9_])(hf|api_org)_[A-Za-z0-9]{30,}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SCANNED = 1 << 24  # bytes: what is larger is no text


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingFile:
    """A file as it will stand in the repository.

    Attributes:
        path: relative, with forward slashes.
        size: in bytes.
        source: where it lies, or what it holds.
    """

    path: str
    size: int
    source: Path | bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A file or folder that stays, and why."""

    path: str
    reason: str


def choose_files(directory: Path) -> tuple[list[OutgoingFile], list[LeftOut]]:
    """Walks a directory. Symbolic links are neither followed nor sent, wherever they lead.

    Raises:
        ResourceError: a folder or file cannot be read.
    """
    files: list[OutgoingFile] = []
    left_out: list[LeftOut] = []
    try:
        for found in _walk(directory, ""):
            (files if isinstance(found, OutgoingFile) else left_out).append(found)  # type: ignore[arg-type]
    except OSError as error:
        raise ResourceError(error.filename or directory, f"cannot be read ({error.strerror})") from error
    return sorted(files, key=lambda file: file.path), sorted(left_out, key=lambda file: file.path)


def _walk(directory: Path, prefix: str) -> Iterator[OutgoingFile | LeftOut]:
    for entry in os.scandir(directory):
        path, status = prefix + entry.name, entry.stat(follow_symlinks=False)
        if S_ISLNK(status.st_mode):
            yield LeftOut(path=path, reason="symbolic link")
        elif not entry.name.isprintable():
            yield LeftOut(path=ascii(path), reason="unprintable name")
        elif (reason := _reason_to_stay(entry.name)) is not None:
            yield LeftOut(path=path, reason=reason)
        elif S_ISDIR(status.st_mode):
            yield from _walk(Path(entry.path), f"{path}/")
        elif S_ISREG(status.st_mode):
            yield OutgoingFile(path=path, size=status.st_size, source=Path(entry.path))
        else:
            yield LeftOut(path=path, reason="not a plain file")


def _reason_to_stay(name: str) -> str | None:
    low = name.lower()
    for reason, patterns in _STAYS:
        if any(fnmatchcase(low, pattern) for pattern in patterns):
            return reason
    return None


def refuse_tokens(files: Sequence[OutgoingFile], token: str | None) -> None:
    """Demands that no file but the weights holds an access token: the user's own, or what looks like one of the Hub's.

    Raises:
        InputError: names the file, never the token. ResourceError: a file cannot be read.
    """
    for file in files:
        if file.path.lower().endswith(_WEIGHTS) or file.size > _SCANNED:
            continue
        content = file.source if isinstance(file.source, bytes) else _read(file.source)
        if _TOKEN.search(content) or (token and token.encode() in content):
            raise InputError(file.path, "holds what looks like an access token", remedy="remove it before pushing")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ResourceError(path, f"cannot be read ({error.strerror})") from error
