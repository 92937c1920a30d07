"""Lists the images under a folder and reads small text files."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from equalize.errors import DataError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".gif", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".npy"),
)
"""File names that count as images or masks, in any case."""

_UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".dng", ".cr2", ".nef", ".exr", ".hdr", ".svs", ".czi", ".nd2", ".lif"),
    *(".dcm", ".dicom", ".nii", ".nii.gz", ".nrrd", ".mha", ".npz", ".h5", ".hdf5", ".mat", ".zarr"),
)


def list_images(folder: Path) -> list[Path]:
    """All images and arrays under `folder`, at any depth, sorted by their relative POSIX path; see `walk_files`.

    A dangling link is listed: reading it raises an error with its name.
    """
    found = [path for path in walk_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def list_unread(folder: Path) -> list[Path]:
    """Files under `folder` of other kinds that may hold images."""
    return sorted(path for path in walk_files(folder) if path.name.lower().endswith(_UNREAD_SUFFIXES))


def walk_files(folder: Path) -> Iterator[Path]:
    """Files of any kind under `folder`, at any depth and in no particular order; a DataError if it may not be read.

    Hidden files and folders and macOS's `__MACOSX` are passed over; symbolic links are followed, but for those to a
    folder that they lie in (`ln -s`, called twice, makes one).
    """
    for here, subfolders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not (_is_passed_over(name) or _leads_back(here, name)))
        yield from (Path(here, name) for name in files if not _is_passed_over(name))


def first_file(paths: Iterable[Path]) -> Path | None:
    """The first of these paths that is a file."""
    return next((path for path in paths if path.is_file()), None)


def read_text(path: Path) -> str:
    """A small UTF-8 file, with or without a byte order mark; a DataError if it cannot be read so."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(path, "is not UTF-8 text") from error


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name in {"__MACOSX", "Thumbs.db"}


def _leads_back(here: str | Path, name: str) -> bool:
    link = os.path.join(here, name)
    return os.path.islink(link) and Path(os.path.realpath(here)).is_relative_to(os.path.realpath(link))


def _refuse(error: OSError) -> None:
    raise DataError(error.filename, f"cannot be listed ({error.strerror})") from error
