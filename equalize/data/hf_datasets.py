"""Tables of Hugging Face `datasets` from files, saved directories and the Hub; its errors as ours.

Arrow files are memory-mapped. Parquet files and the Hub's are first written as such into the user's cache of
`datasets` (HF_DATASETS_CACHE), once; so memory does not grow with the data set, but that folder does.

The name of a table may end with a choice of columns and of a configuration:

    data.parquet:image=photo,label=mask
    org/name@revision:config=en,label=mask
"""

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from equalize.errors import DataError, EqualizeError, ResourceError
from equalize.hub import hub_reachable

Tables = Mapping[str | None, Any]
"""A `datasets.Dataset` for each split; for None where there are no splits."""

_LONGEST = 200  # characters of what the library says
_CLASSES_FILE = "id2label.json"
_CHOICE = re.compile(r":((?:config|image|label)=[^,=]+(?:,(?:config|image|label)=[^,=]+)*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A table and what of it is meant, where that is not clear.

    Attributes:
        place: the file, the folder or the Hub id.
        image, label: columns.
        config: the configuration of a data set on the Hub.
    """

    place: str
    image: str | None = None
    label: str | None = None
    config: str | None = None

    @classmethod
    def of(cls, source: str | Path) -> Self:
        """Takes the choice off the name of a data set; a file of the whole name goes first."""
        name = os.fspath(source)
        found = None if os.path.lexists(name) else _CHOICE.search(name)
        if found is None:
            return cls(place=name)
        return cls(place=name[: found.start()], **dict(pair.split("=") for pair in found[1].split(",")))

    def __bool__(self) -> bool:
        return any((self.image, self.label, self.config))


def load_files(where: Path, files: Mapping[str | None, Sequence[Path]]) -> Tables:
    """Parquet or arrow files, all of one kind, by split.

    Args:
        where: what the user named.
        files: by split.

    Raises:
        DataError: they cannot be read. ResourceError: the library is not installed, or there is no room.
    """
    kind = next(iter(files.values()))[0].suffix.lower().removeprefix(".")
    keys = {split or "train": split for split in files}
    named = {key: [str(path) for path in files[split]] for key, split in keys.items()}
    with _library(where) as datasets:
        loaded = datasets.load_dataset(kind, data_files=named)
        return {split: loaded[key] for key, split in keys.items()}


def load_saved(directory: Path) -> Tables:
    """What `save_to_disk` wrote.

    Raises:
        DataError: it cannot be read. ResourceError: the library is not installed.
    """
    with _library(directory) as datasets:
        return _by_split(datasets.load_from_disk(str(directory)))


def load_from_hub(choice: Choice) -> Tables:
    """All splits of a data set on the Hub, from the cache where the Hub cannot be reached.

    Args:
        choice: ``org/name[@revision]`` and, where it has several, a configuration.

    Raises:
        DataError: it cannot be read, or has several configurations and none was named.
        ResourceError: it is not there, or the Hub is not.
    """
    name = choice.place
    repository, _, revision = name.partition("@")
    with _library(name, hub=True) as datasets, _offline_if_unreachable() as offline:
        tables = _by_split(datasets.load_dataset(repository, choice.config, revision=revision or None))
        if offline and revision and not _is_cached_as(tables, repository, revision):
            raise ResourceError(
                name, "another revision is in the cache, and the Hub cannot be reached", remedy="check the network"
            )
        return tables


def classes_file(name: str) -> Path | None:
    """The file `id2label.json` of a data set on the Hub, if it has one and it can be had."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        with _offline_if_unreachable():
            found = hf_hub_download(repository, _CLASSES_FILE, repo_type="dataset", revision=revision or None)
    except (OSError, ValueError):  # no such file, no network, switched off: names are optional
        return None
    return Path(found)


def _is_cached_as(tables: Tables, repository: str, revision: str) -> bool:
    """Whether tables from the cache are of that revision: without the Hub, the library takes what it finds."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="dataset"))
    branch = cache / "refs" / revision
    commit = branch.read_text(encoding="utf-8").strip() if branch.is_file() else revision
    return {Path(file["filename"]).parent.name for each in tables.values() for file in each.cache_files} == {commit}


def _by_split(loaded: Any) -> Tables:
    return {str(split): table for split, table in loaded.items()} if isinstance(loaded, dict) else {None: loaded}


@contextmanager
def _library(where: object, *, hub: bool = False) -> Iterator[ModuleType]:
    """The library, which is an extra, without its warnings and, off a terminal, its progress bars."""
    try:
        import datasets
        from datasets import logging as its_logging
    except ImportError as error:
        raise ResourceError(
            where, "cannot be read without the library datasets", remedy="pip install equalize[datasets]"
        ) from error
    verbosity, bars = its_logging.get_verbosity(), datasets.is_progress_bar_enabled()
    its_logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield datasets
    except (EqualizeError, MemoryError):
        raise
    except Exception as error:  # what parquet, arrow, fsspec, the Hub's client and the library itself raise
        raise _explained(where, error, hub=hub) from error
    finally:
        its_logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _offline_if_unreachable() -> Iterator[bool]:
    """As with HF_HUB_OFFLINE where the Hub cannot be reached: else the client tries again for half a minute.

    Gives whether that is so.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline = not hub_reachable()
    try:
        yield offline
    finally:
        constants.HF_HUB_OFFLINE = before


def _explained(where: object, error: Exception, *, hub: bool) -> EqualizeError:
    """An error of the library as one of ours."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    reason = " ".join(str(chain[-1]).split())[:_LONGEST] or type(error).__name__
    numbers = {each.errno for each in chain if isinstance(each, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT} or "disk space" in reason:
        return ResourceError(
            where, "the disk with the cache of datasets is full", remedy="make room, or set HF_DATASETS_CACHE"
        )
    if hub and type(error).__name__ == "DatasetNotFoundError":
        return ResourceError(
            where,
            "no such path, and no such data set on the Hub, or none for you",
            remedy="check the name; private and gated ones need `hf auth login`",
        )
    if hub and isinstance(error, ConnectionError):
        return ResourceError(
            where,
            "no such path, and the Hub cannot be reached to look for a data set of that name",
            remedy="check the name or the network",
        )
    if hub and numbers:  # errors of HTTP are OSErrors as well
        return ResourceError(where, f"cannot be downloaded from the Hub ({reason})")
    remedy = f"name one: {where}:config=NAME" if "onfig name is missing" in reason else None
    return DataError(where, f"cannot be read as a data set ({reason})", remedy=remedy)
