"""A zip file that torch.save wrote -> the pickle in it, its directory checked before anything is unpickled."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from equalize.errors import CheckpointError

__all__ = ["read_pickle"]

_LARGEST_PICKLE = 1 << 26  # 64 MiB; that of 30,000 tensors with the state of their optimizer has 20


def read_pickle(path: Path) -> bytes:
    """The pickle of a file, as torch itself finds it.

    Raises:
        CheckpointError: truncated, an archive of another kind or of compressed members, or its pickle is too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(path, "is truncated or damaged (no zip directory)", remedy="download it again") from error
    _check_kind(path, [member.filename for member in members])
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(path, "is a zip file with compressed members, which torch.save never writes")
    return _read(path)


def _check_kind(path: Path, names: Sequence[str]) -> None:
    """Tell torch's archives apart by what lies in their one folder."""
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise CheckpointError(
            path,
            "is a TorchScript archive, which holds code",
            remedy="save its weights instead: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')",
        )
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


def _read(path: Path) -> bytes:
    """Read the pickle by torch's own reader, and check the sizes which that reader found: it is what loads the file."""
    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))  # whose stub lacks methods
        sizes = {record: reader.get_record_size(record) for record in reader.get_all_records()}
        if sum(sizes.values()) > path.stat().st_size:
            raise CheckpointError(path, "promises more bytes than it has", remedy="download it again")
        if (size := reader.get_record_size("data.pkl")) > _LARGEST_PICKLE:
            raise CheckpointError(
                path,
                f"holds a pickle of {size} bytes beside its tensors",
                expected=f"at most {_LARGEST_PICKLE}",
                remedy="save the state dict alone: torch.save(model.state_dict(), 'weights.pth')",
            )
        pickled: bytes = reader.get_record("data.pkl")
    except (RuntimeError, UnicodeDecodeError) as error:  # the reader's message may quote the file's own bytes
        line = next(iter(str(error).splitlines()), "")[:120]
        raise CheckpointError(path, f"is truncated or damaged ({line})", remedy="download it again") from error
    return pickled
