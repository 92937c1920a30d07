"""Pictures that are named one by one, by folder, or by a pattern such as `'drive/**/*.jpg'`."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from equalize.data.depth import with_depth
from equalize.data.folders import IMAGE_SUFFIXES, list_images, list_unread
from equalize.data.images import Deep, Item
from equalize.data.pairing import match
from equalize.errors import DataError
from equalize.messages import first_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Pictures, each with a name of its own.

    Attributes:
        images: in the order in which they were named, folders and patterns sorted.
        names: of each, relative to the folder that holds all of them and without the suffix; with it where two
            pictures differ by that alone.
        folders: that were named, directly or by a pattern.
        notes: what was passed over, and how 16 bits are read.
    """

    images: tuple[Item, ...]
    names: tuple[PurePosixPath, ...]
    folders: tuple[Path, ...]
    notes: tuple[str, ...]


def select_pictures(places: Sequence[str | Path]) -> Selection:
    """Find the pictures of all `places`; masks beside pictures in a folder are passed over.

    A DataError if a place does not exist, matches nothing, or holds no picture.
    """
    notes: list[str] = []
    found: dict[Path, Path] = {}  # picture -> the folder that it was named by
    folders: list[Path] = []
    for base, place in (each for given in places for each in _matches(str(given))):
        if place.is_dir():
            folders.append(place)
            found |= {path: base for path in _in_folder(place, notes) if path not in found}
        else:
            found.setdefault(place, base)
    bases = sorted({*found.values()})
    above = Path(os.path.commonpath(bases))
    relative = [PurePosixPath(path.relative_to(above).as_posix()) for path in found]
    stems = Counter(path.with_suffix("") for path in relative)
    names = tuple(path.with_suffix("") if stems[path.with_suffix("")] == 1 else path for path in relative)
    names = names if len({*names}) == len(names) else tuple(relative)
    images, about_depth = with_depth([*found], [*found])
    return Selection(images=images, names=names, folders=tuple(folders), notes=(*notes, *about_depth))


def file_of(item: Item) -> Path:
    """The file of a picture from `select_pictures`."""
    path = item.item if isinstance(item, Deep) else item
    assert isinstance(path, Path)
    return path


def _matches(given: str) -> Iterator[tuple[Path, Path]]:
    """The files and folders that are meant, each with the folder that names are relative to; absolute paths."""
    path = Path(given).expanduser()
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long, for example
        raise DataError(given, f"cannot be read ({error.strerror})") from error
    if there:
        base = (path if path.is_dir() else path.parent).resolve()
        yield base, (base if path.is_dir() else base / path.name)
        return
    first = next((place for place, part in enumerate(path.parts) if glob.has_magic(part)), None)
    if first is None or ".." in path.parts[first:]:
        what = "no such picture or folder"
        raise DataError(given, what, remedy="name pictures, folders, or a pattern in quotes such as 'folder/*.jpg'")
    base, pattern = Path(*path.parts[:first]).resolve(), path.parts[first:]
    found = [base / each for each in sorted(glob.glob(str(Path(*pattern)), root_dir=base, recursive=True))]
    folders = [] if "**" in pattern else [each for each in found if each.is_dir()]  # ** has their files as well
    files = [each for each in found if not each.is_dir() and each.suffix.lower() in IMAGE_SUFFIXES]
    if not files and not folders:
        raise DataError(given, "matches no picture", expected=f"files named {' '.join(IMAGE_SUFFIXES)}")
    yield from ((base, each) for each in (*folders, *files))


def _in_folder(folder: Path, notes: list[str]) -> list[Path]:
    files = list_images(folder)
    if not files:
        raise DataError(folder, "holds no picture", expected=f"files named {' '.join(IMAGE_SUFFIXES)}")
    pictures = [picture for picture, _ in match(folder, files).pairs]
    taken = {*pictures}
    passed = (
        ([path for path in files if path not in taken], "passed over as masks or the like"),
        (list_unread(folder), "of kinds that are not read"),
    )
    for others, what in passed:
        if others:
            names = first_of([path.relative_to(folder).as_posix() for path in others])
            notes.append(f"{folder}: {len(others)} file{'s' * (len(others) > 1)} {what} ({names})")
    return pictures
