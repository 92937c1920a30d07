"""Writes a directory atomically: filled under a temporary name, flushed to disk, renamed."""

import ctypes
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from equalize.errors import OutputError, ResourceError

CLASS_NAMES_FILE = "class_names.json"
"""Written beside weights whose format has no field for class names: {"0": name of class 0, ...}."""

PLAN_FILE = "equalize.json"

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_STALE = 3600.0  # seconds: temporary directories in which nothing newer lies were left by a killed process
_WRITTEN_ANEW = {CLASS_NAMES_FILE, PLAN_FILE, "finetune.yaml", "last", "metrics.jsonl"}
_WRITTEN_ANEW |= {"curves.png", "panels.png", "report.html"}
_NEVER_COPIED = {".git", ".cache", "__pycache__", *_WRITTEN_ANEW}
TRAINING_STATE = (
    *("checkpoint-*", "global_step*", "optimizer*", "*.optimizer*", "*optim_states*", "scheduler.*", "scaler.*"),
    *("rng_state*", "random_states*", "sampler.bin", "custom_checkpoint_*.pkl", "pytorch_model_fsdp*"),
    *("trainer_state.json", "latest", "zero_to_fp32.py"),
)
"""Names, in lower case, of files and folders from which trainers resume: they belong to the weights beside them."""


@contextmanager
def atomic_directory(target: str | Path, *, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` to fill; on exit flush it and rename it to ``target``.

    An exception leaves what was there before untouched and removes the sibling. Siblings that a killed process left
    are removed by the next call for the same directory, an hour after the last write.

    Raises:
        OutputError: the target is no directory, exists (unless ``overwrite``), or is, holds or lies in
            ``source``.
        ResourceError: the disk is full, or writing is denied.
    """
    out = Path(target).expanduser().absolute()
    check_target(out, overwrite, source)
    work = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{glob.escape(out.name)}.tmp-????????"):
            if _is_stale(left):
                shutil.rmtree(left, ignore_errors=True)
        work.mkdir()
        yield work
        _flush(work)
        take_place(work, out)
    except OSError as error:
        raise _resource_error(out, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_stale(work: Path) -> bool:
    try:
        return all(time.time() - path.lstat().st_mtime > _STALE for path in (work, *work.rglob("*")))
    except FileNotFoundError:  # its process writes, or renamed it just now
        return False


def check_target(out: Path, overwrite: bool, source: str | Path | None) -> None:
    """Refuse a directory that cannot or must not be written, before any work is done for it; see `atomic_directory`."""
    out = out.expanduser()
    if not out.name:
        raise OutputError(out, "is no name for a directory")
    demand_apart(out, [source])
    if out.is_symlink():
        raise OutputError(out, "is a link, which is not followed", remedy="name the directory itself")
    if out.exists() and not out.is_dir():
        raise OutputError(out, "exists and is not a directory")
    if out.exists() and not overwrite:
        raise OutputError(out, "exists", remedy="--overwrite replaces it")
    above = next((place for place in out.parents if place.exists()), out.parent)
    if not above.is_dir():
        raise OutputError(out, f"cannot be made: {above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ResourceError(out, f"cannot be written: {above} is read-only or not yours")


def demand_apart(out: str | Path, places: Iterable[str | Path | None], *, inside: bool = False) -> None:
    """Refuse a directory that is or holds a place that is read or, unless it may lie `inside` one, lies in one.

    Args:
        out: OUT. places: files and folders by name; what does not exist, such as a Hub id, is passed over.
    """
    out = Path(out).expanduser()
    resolved, remedy = out.resolve(), "name another directory"
    for place in (os.path.expanduser(each) for each in places if each):
        if not os.path.exists(place):
            continue
        origin = Path(os.path.realpath(place))
        if resolved == origin:
            raise OutputError(out, "is read itself", remedy=remedy)
        if origin in resolved.parents and not inside:
            raise OutputError(out, f"lies in {place}, which is read", remedy=remedy)
        above = {*origin.parents, *Path(os.path.abspath(place)).parents}  # of a link, both where it is and leads to
        if above & {resolved, Path(os.path.abspath(out))}:
            raise OutputError(out, f"holds {place}, which is read", remedy=remedy)


def take_place(work: Path, out: Path) -> None:
    """Rename the finished directory to its name and remove the one that had it; in one step where the system can."""
    if not out.exists():
        os.rename(work, out)
    elif not _exchange(work, out):
        old = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
        os.rename(out, old)
        try:
            os.rename(work, out)
        except BaseException:
            os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _flush_directory(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories atomically (Linux only); False where that is not supported."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _flush(directory: Path) -> None:
    readable = (
        directory.stat().st_mode & 0o666
    )  # as the umask has it: safetensors makes files readable for the owner alone
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            path.chmod(path.stat().st_mode | readable)
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(folder))


def _flush_directory(directory: Path) -> None:
    if os.name == "nt":  # Windows cannot open directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _resource_error(out: Path, error: OSError) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(out, "the disk is full", remedy="nothing was left behind")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(out, f"cannot be written ({error.strerror})")
    return ResourceError(out, f"writing failed ({error.strerror or error})")


def copy_side_files(source: Path, directory: Path, *, leave_out: set[Path]) -> None:
    """Copy a checkpoint's other files, except a training's state, which does not belong to other weights.

    Links that lead out of the checkpoint are not followed (but into a Hub cache they are).
    """
    root = source.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in source.rglob("*"):
        inner = path.relative_to(source)
        real = Path(os.path.realpath(path))  # also for a link to itself
        inside = any(place in real.parents for place in allowed)
        unwanted = not _NEVER_COPIED.isdisjoint(inner.parts) or any(map(is_training_state, inner.parts))
        if path in leave_out or unwanted or not inside or not real.is_file():
            continue
        (directory / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real, directory / inner)


def is_training_state(name: str) -> bool:
    """Whether a file or folder of this name is the state of a training, of an optimizer for example."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in TRAINING_STATE)
