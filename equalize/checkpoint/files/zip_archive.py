"""A zip file that torch.save wrote -> the pickle in it, its directory checked before anything is unpacked."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from equalize.errors import CheckpointError

__all__ = ["read_pickle"]

_NEITHER_WAY = "is a zip file that readers of zip files take differently, which torch.save never writes"


def read_pickle(path: Path) -> bytes:
    """The pickle of a file, as torch itself finds it.

    Raises:
        CheckpointError: truncated, an archive of another kind, or none that torch.save writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(path, "is truncated or damaged (no zip directory)", remedy="download it again") from error
    _check_kind(path, [member.filename for member in members])
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(path, "is a zip file with compressed members, which torch.save never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(path, "promises more bytes than it has", remedy="download it again")
    return _read(path, members)


def _check_kind(path: Path, names: Sequence[str]) -> None:
    """Tell torch's archives apart by what lies in their one folder."""
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise CheckpointError(
            path,
            "is a TorchScript archive, which holds code",
            remedy="save its weights instead: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')",
        )
    if len({name.lower() for name in inner}) != len(names):  # torch does not look at case
        raise CheckpointError(path, "is a zip file with two members of one name, which torch.save never writes")
    if "data.pkl" in inner:
        return
    if any("exported_program" in name or name.endswith("archive_format") for name in {*names, *inner}):
        raise CheckpointError(
            path,
            "is an exported program (.pt2), which holds code",
            remedy="save its weights instead: torch.save(torch.export.load(FILE).state_dict, 'weights.pth')",
        )
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(path, "is a NumPy archive (.npz)", remedy="save its arrays as tensors with torch.save")
    first = ", ".join(repr(name[:60]) for name in names[:3])
    raise CheckpointError(path, "is a zip file but not a PyTorch file (no data.pkl)", got=first or "no members")


def _read(path: Path, members: Sequence[zipfile.ZipInfo]) -> bytes:
    """Read the pickle by torch's own reader, which must have found the same members in the same places.

    A zip file can hold two directories; what one reader has checked is then not what the other reads.
    """
    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))  # whose stub lacks methods
        if len(reader.get_all_records()) != len(members):
            raise CheckpointError(path, _NEITHER_WAY)
        for member in members:
            record = member.filename.partition("/")[2]
            place = reader.get_record_header_offset(record), reader.get_record_size(record)
            if place != (member.header_offset, member.file_size):
                raise CheckpointError(path, _NEITHER_WAY)
        pickled: bytes = reader.get_record("data.pkl")
    except (RuntimeError, UnicodeDecodeError) as error:  # the reader's message may quote the file's own bytes
        line = next(iter(str(error).splitlines()), "")[:120]
        raise CheckpointError(path, f"is truncated or damaged ({line})", remedy="download it again") from error
    return pickled
