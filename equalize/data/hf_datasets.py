"""Loads tables of Hugging Face `datasets` from files, folders and the Hub; raises its errors as ours.

Arrow files are memory-mapped. Parquet files and the Hub's are first written as such into the user's cache of
`datasets` (HF_DATASETS_CACHE), once; so memory does not grow with the data set, but that folder does.

The name of a table may end with a choice of columns and of a configuration:

    data.parquet:image=photo,label=mask
    org/name@revision:config=en,label=mask
"""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from equalize.data.folders import walk_files
from equalize.errors import DataError, EqualizeError, ResourceError
from equalize.hub import HUB_ID, hub_reachable, why_not_reached

Tables = Mapping[str | None, Any]
"""A `datasets.Dataset` for each split; for None where there are no splits."""

_SUFFIXES = (".parquet", ".arrow")
_SAVED = ("dataset_dict.json", "state.json")
_CHOICE = re.compile(r":((?:config|image|label)=[^,=]+(?:,(?:config|image|label)=[^,=]+)*)$")
_LONGEST = 200  # characters of what the library says


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A table (a file, a folder or a Hub id), and the columns and configuration that the user chose."""

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


def load_tables(choice: Choice) -> Tables | None:
    """What is in a file, in a folder (at any depth, or from `save_to_disk`) or on the Hub; None where no table is.

    A DataError if it cannot be read, or has several configurations and none was named; a ResourceError for the rest.
    """
    name = choice.place
    suffix = os.path.splitext(name)[1].lower()
    if os.path.isdir(name):
        folder = os.path.abspath(name)  # a relative name might be one of the library's own, such as "csv"
        saved = any(os.path.isfile(os.path.join(folder, file)) for file in _SAVED)
        tables = (path for path in walk_files(Path(name)) if path.suffix.lower() in _SUFFIXES)
        if saved or any(path.stem != "metadata" for path in tables):  # which describes the images beside it
            with _library(name) as datasets:
                loaded = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder, choice.config)
                return _by_split(loaded)
    elif os.path.isfile(name) and suffix in _SUFFIXES:
        with _library(name) as datasets:
            return {None: datasets.load_dataset(suffix.removeprefix("."), data_files=name, split="train")}
    elif HUB_ID.fullmatch(name) and suffix not in _SUFFIXES and not os.path.lexists(name):
        return _load_from_hub(name, choice.config)
    return None


def hub_class_names(name: str) -> Path | None:
    """The file `id2label.json` of a data set on the Hub; None if there is none or it cannot be downloaded."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    download = partial(hf_hub_download, repository, "id2label.json", repo_type="dataset", revision=revision or None)
    try:
        return Path(download(local_files_only=not hub_reachable()))
    except (OSError, ValueError):  # no such file, no network, switched off: names are optional
        return None


def _load_from_hub(name: str, config: str | None) -> Tables:
    """All splits of ``org/name[@revision]``, from the cache where the Hub cannot be reached."""
    from huggingface_hub import constants

    repository, _, revision = name.partition("@")
    before, offline, why = constants.HF_HUB_OFFLINE, not hub_reachable(), why_not_reached()
    constants.HF_HUB_OFFLINE = offline  # else the client tries again for half a minute
    try:
        with _library(name, hub=why) as datasets:
            tables = _by_split(datasets.load_dataset(repository, config, revision=revision or None))
    finally:
        constants.HF_HUB_OFFLINE = before
    if offline and revision and not _is_of_revision(tables, repository, revision):
        what = f"another revision is in the cache, not {revision}, and {why[0]}"
        raise ResourceError(name, what, remedy=why[1])
    return tables


def _is_of_revision(tables: Tables, repository: str, revision: str) -> bool:
    """Whether tables from the cache are of that revision: without the Hub, the library takes what it finds."""
    from huggingface_hub import snapshot_download

    try:
        kept = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
    except FileNotFoundError:
        return False
    folders = {Path(file["filename"]).parent.name for table in tables.values() for file in table.cache_files}
    return folders == {Path(kept).name}


def _by_split(loaded: Any) -> Tables:
    return {str(split): table for split, table in loaded.items()} if isinstance(loaded, dict) else {None: loaded}


@contextmanager
def _library(where: object, *, hub: tuple[str, str] | None = None) -> Iterator[ModuleType]:
    """The library, which is an extra, its errors as ours; `hub`: why the Hub may be out of reach, and a remedy."""
    try:
        import datasets
    except ImportError as error:
        what = "cannot be read without the library datasets"
        raise ResourceError(where, what, remedy="pip install equalize[datasets]") from error
    try:
        yield datasets
    except (EqualizeError, MemoryError):
        raise
    except Exception as error:  # what parquet, arrow, fsspec, the Hub's client and the library itself raise
        raise _explained(where, error, hub=hub) from error


def _explained(where: object, error: Exception, *, hub: tuple[str, str] | None) -> EqualizeError:
    """An error of the library as one of ours."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    reason = " ".join(str(chain[-1]).split())[:_LONGEST] or type(error).__name__
    numbers = {each.errno for each in chain if isinstance(each, OSError)}
    remedy = None
    if numbers & {errno.ENOSPC, errno.EDQUOT} or "disk space" in reason:
        what, remedy = "the disk with the cache of datasets is full", "make room, or set HF_DATASETS_CACHE"
    elif hub and type(error).__name__ == "DatasetNotFoundError":
        what = "no such path, and no such data set on the Hub, or none for you"
        remedy = "check the name; private and gated ones need `hf auth login`"
    elif hub and isinstance(error, ConnectionError):
        what, remedy = f"no such path, no such data set in the cache, and {hub[0]}", f"check the name, and {hub[1]}"
    elif hub and numbers:  # errors of HTTP are OSErrors as well
        what = f"cannot be downloaded from the Hub ({reason})"
    else:
        remedy = f"name one: {where}:config=NAME" if "onfig name is missing" in reason else None
        return DataError(where, f"cannot be read as a data set ({reason})", remedy=remedy)
    return ResourceError(where, what, remedy=remedy)
